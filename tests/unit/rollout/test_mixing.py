"""The on-policy share is exact over time, and every choice and seed can be repeated."""

import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gkd.rollout.mixing import choose_on_policy, sampling_seed, stable_hash


@given(st.floats(0, 1), st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(0, 2**32))
def test_of_the_first_n_samples_the_exact_share_is_on_policy(lmbda: float, sizes: list[int], seed: int):
    seen, on_policy = 0, 0
    for size in sizes:
        flags = choose_on_policy(size, lmbda=lmbda, consumed_samples=seen, seed=seed)
        assert len(flags) == size
        seen, on_policy = seen + size, on_policy + sum(flags)
        assert on_policy == math.floor(lmbda * seen)


@pytest.mark.parametrize(("lmbda", "flag"), [(0.0, False), (1.0, True)])
def test_the_ends_of_the_range_mix_nothing(lmbda: float, flag: bool):
    for consumed in range(0, 100, 7):
        assert choose_on_policy(7, lmbda=lmbda, consumed_samples=consumed, seed=1) == [flag] * 7


def test_a_resumed_run_chooses_as_the_unbroken_one_and_another_seed_otherwise():
    def choices(seed: int) -> list[list[bool]]:
        return [choose_on_policy(16, lmbda=0.5, consumed_samples=16 * i, seed=seed) for i in range(20)]

    assert choices(1) == choices(1)
    assert choices(1) != choices(2)
    assert len(set(map(tuple, choices(1)))) > 10, (
        "the places of on-policy samples do not change between iterations"
    )


def test_every_place_of_a_batch_is_on_policy_equally_often():
    counts = [0] * 8
    for i in range(2000):
        for place, flag in enumerate(choose_on_policy(8, lmbda=0.25, consumed_samples=8 * i, seed=3)):
            counts[place] += flag
    assert all(abs(count - 500) < 100 for count in counts), counts


def test_seeds_differ_by_everything_that_is_asked_for_and_fit_a_signed_integer():
    asked = [(s, i, row, k) for s in (0, 1) for i in range(10) for row in range(20) for k in range(4)]
    seeds = {sampling_seed(*what) for what in asked}
    assert len(seeds) == len(asked)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_hashes_are_the_same_on_every_machine():
    """A change here would break the resumption of every run."""
    digest = hashlib.sha256(b"1234/on-policy/8").digest()
    assert stable_hash(1234, "on-policy", 8) == int.from_bytes(digest[:8], "little")
    assert sampling_seed(1, 2, 3, 4) == sampling_seed(1, 2, 3, 4, file=0) == 3447186396264559642
    assert sampling_seed(1, 2, 3, 4, file=1) == 3613253145795680058
