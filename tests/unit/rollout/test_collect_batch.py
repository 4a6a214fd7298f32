"""A batch has every sample in its place, on-policy or from data, and asks the engine once with the right seeds."""

import pytest

from megatron_gkd.data.sample import Prompt
from megatron_gkd.rollout.mixing import collect_batch
from megatron_gkd.serving.protocol import Completion
from megatron_gkd.train.lifecycle import TrainState


class StandInLoader:
    def __init__(self):
        self.taken = 0

    def take(self, n: int) -> list[Prompt]:
        rows = range(self.taken, self.taken + n)
        self.taken += n
        return [Prompt(row, (row, 1), (row, 2, 9), f"text {row}") for row in rows]


class StandInEngine:
    """Answers a prompt with its seed, so that a mix-up shows."""

    def __init__(self):
        self.requests: list[tuple[list, list]] = []

    def generate(self, prompts, seeds):
        self.requests.append((list(prompts), list(seeds)))
        return [
            Completion((seed % 1000, prompt[0]), "stop", 5)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]


def collect(lmbda: float, state: TrainState, num_samples: int = 2, loader=None, engine=None):
    return collect_batch(
        loader or StandInLoader(),
        engine or StandInEngine(),
        iteration=state.iteration,
        consumed_samples=state.consumed_samples,
        global_batch_size=8,
        num_samples=num_samples,
        lmbda=lmbda,
        seed=11,
    )


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 0.5, 1.0])
def test_every_prompt_has_its_samples_in_order_with_its_own_completions(lmbda: float):
    engine = StandInEngine()
    batch = collect(lmbda, TrainState(iteration=3, consumed_samples=24), engine=engine)
    assert [(s.row, s.sample_index) for s in batch.samples] == [
        (row, k) for row in range(4) for k in range(2)
    ]
    for sample in batch.samples:
        assert sample.prompt_ids == (sample.row, 1)
        if sample.is_on_policy:
            assert sample.completion_ids[1] == sample.row
            assert (sample.finish_reason, sample.weight_version) == ("stop", 5)
        else:
            assert sample.completion_ids == (sample.row, 2, 9)
            assert (sample.finish_reason, sample.weight_version) == ("data", -1)
    on_policy = sum(s.is_on_policy for s in batch.samples)
    assert on_policy == int(lmbda * 32) - int(lmbda * 24)
    assert len(engine.requests) == (on_policy > 0), "one request, and none for nothing"


def test_samples_of_one_prompt_and_of_other_iterations_have_different_seeds():
    engine = StandInEngine()
    for iteration in range(3):
        collect(1.0, TrainState(iteration=iteration), engine=engine)
    seeds = [seed for _, request in engine.requests for seed in request]
    assert len(set(seeds)) == len(seeds) == 24


def test_the_same_state_collects_the_same_batch_again():
    state = TrainState(iteration=2, consumed_samples=16)
    assert collect(0.5, state) == collect(0.5, state)
    assert collect(0.5, state) != collect(0.5, TrainState(iteration=3, consumed_samples=24))


def test_the_loader_gives_one_prompt_for_several_samples():
    loader = StandInLoader()
    collect(1.0, TrainState(), num_samples=4, loader=loader)
    assert loader.taken == 2


def test_a_prompt_that_comes_twice_in_a_batch_uses_no_seed_twice():
    class ShortLoader:
        def take(self, n):
            return [Prompt(i % 3, (i % 3, 1), None, "", file=i // 6) for i in range(n)]

    engine = StandInEngine()
    batch = collect(1.0, TrainState(), num_samples=1, loader=ShortLoader(), engine=engine)
    assert [(s.file, s.row, s.sample_index) for s in batch.samples] == [
        (0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1), (0, 1, 1), (0, 2, 1), (1, 0, 0), (1, 1, 0),
    ]  # fmt: skip
    assert len(set(engine.requests[0][1])) == 8


def test_earlier_turns_count_in_data_only_and_the_teachers_prompt_in_both():
    class Loader:
        def take(self, n):
            conversation = Prompt(0, (5, 6, 7), (8, 9), "", loss_mask=(False, True, False))
            privileged = Prompt(1, (5, 6, 7), (8, 9), "", teacher_ids=(1, 2))
            return [conversation, privileged] * (n // 2)

    for lmbda, mask in ((0.0, (False, True, False)), (1.0, ())):
        batch = collect(lmbda, TrainState(), num_samples=1, loader=Loader())
        assert {s.prompt_loss_mask for s in batch.samples if s.row == 0} == {mask}
        assert {s.teacher_prompt_ids for s in batch.samples if s.row == 1} == {(1, 2)}
