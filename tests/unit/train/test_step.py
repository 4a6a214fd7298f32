"""What is paired with what before a step. The step itself: tests/distributed/test_student_step.py."""

import torch

from megatron_gkd.data.sample import Batch, Sample
from megatron_gkd.teacher.base import HiddenSignal
from megatron_gkd.train.step import attach_signals

COMPLETIONS = (2, 0, 1, 3, 2, 1)


def batch() -> Batch:
    return Batch(
        tuple(
            Sample(
                row=row,
                sample_index=0,
                prompt_ids=(1, 2),
                completion_ids=tuple(range(n)),
                is_on_policy=row % 3 == 0,
                finish_reason="stop",
                weight_version=0,
            )
            for row, n in enumerate(COMPLETIONS)
        )
    )


def micro_batches(dp_rank: int, dp_size: int, micro_batch_size: int = 2):
    return batch().micro_batches(micro_batch_size, dp_rank=dp_rank, dp_size=dp_size, seq_length=6, pad_id=0)


def test_each_row_carries_the_flag_of_its_sample():
    scored = attach_signals(batch(), micro_batches(0, 1), [])
    assert [s.is_on_policy_T.tolist() for s in scored] == [
        [True, True],
        [False, True, True, True],
        [False] * 3,
    ]
    assert all(s.signal is None for s in scored)
    for part in scored:
        assert len(part.is_on_policy_T) == int(part.loss_mask_BS.sum())


def test_signals_stay_with_their_micro_batches():
    signals = [HiddenSignal(torch.full((1, 1), float(i))) for i in range(3)]
    scored = attach_signals(batch(), micro_batches(0, 1), signals)
    assert [s.signal for s in scored] == signals
