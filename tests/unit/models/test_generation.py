"""Draws come from exactly the set that top-k and top-p keep, with the right frequencies.

Whole completions, in every layout: tests/distributed/test_generation. The noise itself: tests/unit/platform.
"""

import pytest
import torch

from megatron_gkd.models.generation import SamplingRule, _draw

PROBABILITIES = torch.tensor([0.05, 0.30, 0.02, 0.40, 0.08, 0.15])
NUM_DRAWS = 20_000


def drawn(temperature: float = 1.0, top_p: float = 1.0, top_k: int = -1, position: int = 3) -> torch.Tensor:
    """Frequency of every token over many seeds."""
    rule = SamplingRule(temperature, top_p, top_k, max_new_tokens=1, stop_token_ids=())
    logits_BV = PROBABILITIES.log().expand(NUM_DRAWS, -1)
    chosen_B = _draw(logits_BV, torch.arange(NUM_DRAWS), position, rule)
    return torch.bincount(chosen_B, minlength=len(PROBABILITIES)) / NUM_DRAWS


def expected(kept: list[int], temperature: float = 1.0) -> torch.Tensor:
    weights = torch.zeros_like(PROBABILITIES)
    weights[kept] = PROBABILITIES[kept] ** (1 / temperature)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 2.0}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 1}, [3]),
        ({"top_k": 3}, [3, 1, 5]),
        ({"top_k": 6}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 1e-9}, [3]),
        ({"top_p": 0.39}, [3]),
        ({"top_p": 0.41}, [3, 1]),
        ({"top_p": 0.71}, [3, 1, 5]),
        ({"top_p": 0.97}, [3, 1, 5, 4, 0]),
        ({"top_p": 0.99}, [0, 1, 2, 3, 4, 5]),
        (
            {"top_k": 3, "top_p": 0.80},
            [3, 1],
        ),  # of the three kept ones 0.82 of the mass: top-p acts after top-k
        ({"top_k": 3, "top_p": 0.83}, [3, 1, 5]),
        ({"top_p": 0.41, "temperature": 4.0}, [3, 1]),  # the flattened distribution counts
    ],
    ids=str,
)
def test_draws_have_the_frequencies_of_the_kept_set(rule: dict, kept: list[int]):
    got = drawn(**rule)
    want = expected(kept, rule.get("temperature", 1.0))
    assert set(got.nonzero().flatten().tolist()) == set(kept)
    assert (got - want).abs().max() < 4 * 0.5 / NUM_DRAWS**0.5


def test_draws_differ_between_positions_and_repeat_at_the_same():
    rule = SamplingRule(1.0, 1.0, -1, 1, ())
    logits_BV, seeds_B = PROBABILITIES.log().expand(200, -1), torch.arange(200)
    first, again, other = (_draw(logits_BV, seeds_B, position, rule) for position in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
