"""One iteration's batch: prompts, and their completions by the student or from data."""

from collections import Counter
from collections.abc import Sequence

from megatron_gkd.data.sample import Batch, Prompt, Sample
from megatron_gkd.data.streams import PromptStream
from megatron_gkd.rollout.base import RolloutEngine
from megatron_gkd.rollout.mixing import choose_on_policy, sampling_seed
from megatron_gkd.train.state import TrainState


def collect_batch(
    loader: PromptStream,
    engine: RolloutEngine,
    state: TrainState,
    *,
    global_batch_size: int,
    num_samples: int,
    lmbda: float,
    seed: int,
) -> Batch:
    """``global_batch_size`` samples, ``num_samples`` of each prompt; collective, the same batch on all ranks.

    Args:
        loader: Where prompts come from; advances.
        engine: Generates the on-policy completions.
        state: How far the run is.
        global_batch_size: Sequences in the batch.
        num_samples: Completions per prompt.
        lmbda: Share of on-policy samples.
        seed: Seed of the run.
    """
    prompts = loader.take(global_batch_size // num_samples)
    slots = _number_samples(prompts, num_samples)
    flags = choose_on_policy(len(slots), lmbda=lmbda, consumed_samples=state.consumed_samples, seed=seed)
    asked = [slot for slot, is_on_policy in zip(slots, flags, strict=True) if is_on_policy]
    written = iter(_generate(engine, asked, state.iteration, seed))
    samples = tuple(
        next(written) if is_on_policy else sample_from_data(prompt, k)
        for (prompt, k), is_on_policy in zip(slots, flags, strict=True)
    )
    return Batch(samples)


def _number_samples(prompts: Sequence[Prompt], num_samples: int) -> list[tuple[Prompt, int]]:
    """(prompt, sample index) in order; a prompt that comes again, in the next pass, counts on."""
    times: Counter[tuple[int, int]] = Counter()
    slots = []
    for prompt in prompts:
        key = prompt.file, prompt.row
        slots += [(prompt, times[key] * num_samples + k) for k in range(num_samples)]
        times[key] += 1
    return slots


def _generate(
    engine: RolloutEngine, slots: Sequence[tuple[Prompt, int]], iteration: int, seed: int
) -> list[Sample]:
    if not slots:
        return []
    seeds = [sampling_seed(seed, iteration, prompt.row, k, file=prompt.file) for prompt, k in slots]
    completions = engine.generate([prompt.ids for prompt, _ in slots], seeds)
    return [
        Sample(
            row=prompt.row,
            sample_index=k,
            prompt_ids=prompt.ids,
            completion_ids=completion.ids,
            is_on_policy=True,
            finish_reason="stop" if completion.finish_reason == "stop" else "length",
            weight_version=completion.weight_version,
            file=prompt.file,
            teacher_prompt_ids=prompt.teacher_ids,
        )
        for (prompt, k), completion in zip(slots, completions, strict=True)
    ]


def sample_from_data(prompt: Prompt, sample_index: int) -> Sample:
    """The prompt with its own completion."""
    assert prompt.completion_ids is not None  # reading refuses rows without one where they are needed
    return Sample(
        row=prompt.row,
        sample_index=sample_index,
        prompt_ids=prompt.ids,
        completion_ids=prompt.completion_ids,
        is_on_policy=False,
        finish_reason="data",
        weight_version=-1,
        file=prompt.file,
        prompt_loss_mask=prompt.loss_mask,
        teacher_prompt_ids=prompt.teacher_ids,
    )
