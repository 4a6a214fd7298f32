"""Small values of the training loop: counters, probes, and what is paired with what before a step."""

import pytest
import torch

from megatron_gkd.data.sample import Batch, Sample
from megatron_gkd.rollout.weight_sync import MAX_PROBE_SEQUENCES, MAX_PROBE_TOKENS, probe_sequences
from megatron_gkd.teacher.base import HiddenSignal
from megatron_gkd.train.evaluation import own_draws
from megatron_gkd.train.lifecycle import TrainState
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


def test_draws_of_a_validation_repeat_and_leave_those_of_training_alone():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    draws = []
    for _ in range(2):
        with own_draws(torch.device("cpu")):
            draws.append(torch.rand(3))
    assert draws[0].equal(draws[1])
    assert torch.rand(2).equal(expected)


def test_counters_survive_json_and_refuse_what_they_do_not_know():
    state = TrainState(iteration=3, consumed_samples=24, skipped_in_a_row=1)
    assert TrainState.from_json(state.to_json()) == state
    with pytest.raises(TypeError, match="colour"):
        TrainState.from_json({**state.to_json(), "colour": 1})


def test_probes_are_few_short_and_long_enough_to_be_scored():
    long = list(range(1000))
    assert probe_sequences([[1], long, [], [3, 4], [5, 6]]) == [long[-MAX_PROBE_TOKENS:], [3, 4]]
    assert MAX_PROBE_SEQUENCES == 2
    assert probe_sequences([(7, 8)]) == [[7, 8]]
    assert probe_sequences([(7,), (8,)]) == [[7, 7], [8, 8]], "one token has nothing to predict"


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
