"""Coordinates of ranks follow Megatron's order. The process groups themselves are used by all of tests/distributed."""

import pytest

from megatron_gkd.parallel.groups import Layout

LAYOUTS = [Layout(tp, pp, tp * pp * dp) for tp in (1, 2, 4) for pp in (1, 2, 3) for dp in (1, 2, 5)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_coordinates_and_ranks_are_one_to_one(layout: Layout):
    for rank in range(layout.num_ranks):
        tp_rank, dp_rank, pp_rank = layout.coordinates(rank)
        assert tp_rank < layout.tp_size
        assert dp_rank < layout.dp_size
        assert pp_rank < layout.pp_size
        assert layout.rank_at(tp_rank=tp_rank, dp_rank=dp_rank, pp_rank=pp_rank) == rank


def test_tensor_parallelism_varies_fastest_and_the_pipeline_slowest():
    layout = Layout(tp_size=2, pp_size=2, num_ranks=8)
    assert layout.dp_size == 2
    assert [layout.coordinates(rank) for rank in (0, 1, 2, 4, 7)] == [
        (0, 0, 0),
        (1, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
        (1, 1, 1),
    ]
    assert layout.last_stage_ranks(dp_rank=1) == [6, 7]
