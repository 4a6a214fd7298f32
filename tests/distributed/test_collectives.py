"""Small collectives give the same plain values on all ranks."""

import math

import pytest
import torch.distributed as dist

from tests.support.on_ranks import CPU


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_values_reach_all_ranks_unchanged(run_on_ranks, num_ranks: int):
    run_on_ranks(num_ranks, _exchange)


def _exchange(rank: int, world_size: int) -> None:
    from megatron_gkd.parallel.collectives import any_rank, broadcast_json, gather_json, reduce_values

    value = {"text": "naive \u00e9 \n", "float": 0.1, "none": None, "nested": [[1, [2]], {}], "big": 2**62}
    for src in range(world_size):
        mine = value if rank == src else {"ignored": rank}
        assert broadcast_json(mine, device=CPU, src=src) == value
    assert broadcast_json(None, device=CPU) is None

    # of different lengths, one of them much longer than the others
    own = {"rank": rank, "text": "x" * (5000 if rank == 1 else rank)}
    everyone = [{"rank": r, "text": "x" * (5000 if r == 1 else r)} for r in range(world_size)]
    assert gather_json(own, device=CPU) == everyone

    last = world_size - 1
    numbers = [float(rank + 1), float(rank), float(rank), -float(rank), 7.0 + rank]
    got = reduce_values(numbers, ["sum", "mean", "max", "min", "rank0"], device=CPU)
    assert got == [world_size * (world_size + 1) / 2, last / 2, last, -last, 7.0]
    assert reduce_values([], [], device=CPU) == []
    assert math.isnan(reduce_values([math.nan if rank == last else 1.0], ["sum"], device=CPU)[0])
    # an odd number above 2**53 / 2 has no float32
    assert reduce_values([2.0**40 + 1 if rank == 0 else 0.0], ["sum"], device=CPU) == [2.0**40 + 1]
    with pytest.raises(ValueError, match="median"):
        reduce_values([1.0], ["median"], device=CPU)

    for only in range(world_size):
        assert any_rank(rank == only, device=CPU)
    assert not any_rank(False, device=CPU)

    pairs = [dist.new_group([first, first + 1]) for first in range(0, world_size, 2)]
    mine = pairs[rank // 2]
    assert reduce_values([float(rank)], ["max"], device=CPU, group=mine) == [rank // 2 * 2 + 1]
    for pair in pairs:
        if pair is mine:
            dist.destroy_process_group(pair)
