"""Which samples of an iteration the student writes itself (Agarwal et al. 2024, arXiv 2306.13649, algorithm 1).

The paper draws one coin per batch; here the share is kept exact over time: of the first n samples of a run,
``floor(lmbda * n)`` are on-policy. Which ones within an iteration is drawn from the seed.
"""

import hashlib
import math
import random


def choose_on_policy(num_samples: int, *, lmbda: float, consumed_samples: int, seed: int) -> list[bool]:
    """One flag per sample of the iteration that starts after ``consumed_samples`` samples.

    Args:
        num_samples: Samples in the iteration.
        lmbda: On-policy share in [0, 1].
        consumed_samples: Samples of the run before this iteration.
        seed: Seed of the run.
    """
    before = math.floor(lmbda * consumed_samples)
    num_on_policy = math.floor(lmbda * (consumed_samples + num_samples)) - before
    flags = [True] * num_on_policy + [False] * (num_samples - num_on_policy)
    random.Random(stable_hash(seed, "on-policy", consumed_samples)).shuffle(flags)
    return flags


def sampling_seed(seed: int, iteration: int, row: int, sample_index: int, *, file: int = 0) -> int:
    """Seed of one completion: a function of what is asked for, not of who generates it or beside what."""
    place = row if file == 0 else f"{file}:{row}"  # rows of the first file go by their number alone
    return stable_hash(seed, "sampling", iteration, place, sample_index) % 2**62


def stable_hash(*parts: int | str) -> int:
    """64 bits that are the same on every machine and in every process."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
