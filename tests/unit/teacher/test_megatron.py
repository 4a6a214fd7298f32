"""Rows are cut at the micro-batches of one copy of the student. Whole teachers in all layouts: tests/distributed."""

import pytest
import torch

from megatron_gkd.data.sample import Batch, Sample
from megatron_gkd.teacher.megatron import _split

COMPLETIONS = (2, 0, 1, 3, 2, 1)


@pytest.mark.parametrize("dp_rank", [0, 1])
def test_rows_in_the_order_of_the_batch_are_cut_at_the_micro_batches_of_one_copy(dp_rank: int):
    """Row t of sample i is the number 10 i + t."""
    samples = tuple(
        Sample(
            row=i,
            sample_index=0,
            prompt_ids=(1, 2),
            completion_ids=tuple(range(n)),
            is_on_policy=True,
            finish_reason="stop",
            weight_version=0,
        )
        for i, n in enumerate(COMPLETIONS)
    )
    parts = Batch(samples).micro_batches(2, dp_rank=dp_rank, dp_size=2, seq_length=6, pad_id=0)
    first = 3 * dp_rank
    rows_TH = torch.tensor([[10.0 * i + t] for i in range(first, first + 3) for t in range(COMPLETIONS[i])])
    signals = _split(rows_TH, parts, COMPLETIONS, first)
    for signal, part in zip(signals, parts, strict=True):
        expected = [10.0 * i + t for i in part.indices for t in range(COMPLETIONS[i])]
        assert signal.rows_TH.flatten().tolist() == expected
