"""Counters of a run. Checkpoints and stop requests need ranks: tests/distributed, tests/e2e."""

import pytest

from megatron_gkd.data.sample import Batch, Sample
from megatron_gkd.train.lifecycle import TrainingFailed, TrainState


def sample(num_tokens: int, *, is_on_policy: bool) -> Sample:
    return Sample(
        row=0,
        sample_index=0,
        prompt_ids=(1, 2),
        completion_ids=tuple(range(num_tokens)),
        is_on_policy=is_on_policy,
        finish_reason="stop",
        weight_version=0,
    )


BATCH = Batch((sample(3, is_on_policy=True), sample(5, is_on_policy=False)))


def test_counters_survive_json_and_refuse_what_they_do_not_know():
    state = TrainState(iteration=3, consumed_samples=24, skipped_in_a_row=1)
    assert TrainState.from_json(state.to_json()) == state
    with pytest.raises(TypeError, match="colour"):
        TrainState.from_json({**state.to_json(), "colour": 1})


def test_an_iteration_counts_samples_tokens_and_those_on_policy():
    state = TrainState(iteration=4, consumed_samples=8, consumed_tokens=100, on_policy_tokens=10)
    state.advance(BATCH, is_skipped=False, max_skipped_updates=0)
    assert state == TrainState(iteration=5, consumed_samples=10, consumed_tokens=108, on_policy_tokens=13)


def test_more_skipped_updates_in_a_row_than_allowed_end_the_run():
    state = TrainState()
    for is_skipped in (True, True, False, True, True):
        state.advance(BATCH, is_skipped=is_skipped, max_skipped_updates=2)
    assert (state.skipped_updates, state.skipped_in_a_row) == (4, 2)
    with pytest.raises(TrainingFailed, match=r"3 updates in a row .* raise train\.max_skipped_updates"):
        state.advance(BATCH, is_skipped=True, max_skipped_updates=2)
    assert state.iteration == 6, "the iteration is counted, so that no batch is taken twice"
