"""One iteration's batch: completions by the student for a share lmbda of the samples, from data for the others.

Agarwal et al. 2024 (arXiv 2306.13649, algorithm 1) draw once per batch. Here the share is exact over time: of the first n
samples of a run, ``floor(lmbda * n)`` are on-policy. Their places within an iteration are drawn from the seed.
"""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence

from megatron_gkd.data.sample import Batch, Prompt, Sample
from megatron_gkd.data.streams import PromptStream
from megatron_gkd.rollout.base import RolloutEngine


def collect_batch(
    prompts: PromptStream,
    rollout: RolloutEngine,
    *,
    iteration: int,
    consumed_samples: int,
    global_batch_size: int,
    num_samples: int,
    lmbda: float,
    seed: int,
) -> Batch:
    """``global_batch_size`` samples, ``num_samples`` of each prompt. Collective, the same batch on all ranks.

    Args:
        prompts: Advances.
        rollout: Generates the on-policy completions.
        iteration: Finished iterations.
        consumed_samples: Samples of the run before this batch.
        global_batch_size: Samples in the batch.
        num_samples: Completions per prompt.
        lmbda: On-policy share in [0, 1].
        seed: Seed of the run.
    """
    # every sample has a fixed place first, so that neither seeds nor order depend on which ones are on-policy
    slots = _number_samples(prompts.take(global_batch_size // num_samples), num_samples)
    flags = choose_on_policy(len(slots), lmbda=lmbda, consumed_samples=consumed_samples, seed=seed)
    on_policy = [slot for slot, is_on_policy in zip(slots, flags, strict=True) if is_on_policy]
    generated = iter(_generate(rollout, on_policy, iteration, seed))
    samples = tuple(
        next(generated) if is_on_policy else sample_from_data(prompt, k)
        for (prompt, k), is_on_policy in zip(slots, flags, strict=True)
    )
    return Batch(samples)


def choose_on_policy(num_samples: int, *, lmbda: float, consumed_samples: int, seed: int) -> list[bool]:
    """One flag per sample of the iteration that starts after ``consumed_samples`` samples.

    Args:
        num_samples: Samples in the iteration.
        lmbda: On-policy share in [0, 1].
        consumed_samples: Samples of the run before this iteration.
        seed: Seed of the run.
    """
    # counted from the start of the run: rounding in every iteration would lose up to a sample each time
    before = math.floor(lmbda * consumed_samples)
    num_on_policy = math.floor(lmbda * (consumed_samples + num_samples)) - before
    flags = [True] * num_on_policy + [False] * (num_samples - num_on_policy)
    random.Random(stable_hash(seed, "on-policy", consumed_samples)).shuffle(flags)
    return flags


def sampling_seed(seed: int, iteration: int, row: int, sample_index: int, *, file: int = 0) -> int:
    """Seed of one completion; depends on neither the engine nor the other samples of the batch."""
    # rows of the first file are named by their number alone, so that runs from before several files repeat
    place = row if file == 0 else f"{file}:{row}"
    return (
        stable_hash(seed, "sampling", iteration, place, sample_index) % 2**62
    )  # fits a signed 64-bit integer


def stable_hash(*parts: int | str) -> int:
    """64-bit hash, equal on every machine and in every process."""
    # hash() of a str differs between processes
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def sample_from_data(prompt: Prompt, sample_index: int) -> Sample:
    """The prompt with the completion of its row."""
    assert prompt.completion_ids is not None  # rows without one are refused where completions are needed
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


def _number_samples(prompts: Sequence[Prompt], num_samples: int) -> list[tuple[Prompt, int]]:
    """(prompt, sample index) in order; a prompt that repeats in the next epoch continues its numbers."""
    times: Counter[tuple[int, int]] = Counter()
    slots = []
    for prompt in prompts:
        key = prompt.file, prompt.row
        slots += [(prompt, times[key] * num_samples + k) for k in range(num_samples)]
        times[key] += 1
    return slots


def _generate(
    rollout: RolloutEngine, slots: Sequence[tuple[Prompt, int]], iteration: int, seed: int
) -> list[Sample]:
    if not slots:
        return []
    seeds = [sampling_seed(seed, iteration, prompt.row, k, file=prompt.file) for prompt, k in slots]
    completions = rollout.generate([prompt.ids for prompt, _ in slots], seeds)
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
