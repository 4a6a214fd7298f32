"""The hash against a scalar MurmurHash3, the sampler against the distribution it is given."""

import pytest
import torch

from megatron_gkd.platform.seeded_sampling import hash32, sample_with_seed


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with hash seed 0, for whole words, from its published definition."""
    low = 0xFFFFFFFF
    state = 0
    for start in range(0, len(data), 4):
        word = int.from_bytes(data[start : start + 4], "little") * 0xCC9E2D51 & low
        word = (word << 15 | word >> 17) & low
        state ^= word * 0x1B873593 & low
        state = (state << 13 | state >> 19) & low
        state = (state * 5 + 0xE6546B64) & low
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B & low
    state = (state ^ state >> 13) * 0xC2B2AE35 & low
    return state ^ state >> 16


def test_the_reference_has_published_values():
    assert murmur3(b"test") == 0xBA6BD213
    assert murmur3(b"") == 0


def test_the_hash_is_murmur3_of_seed_position_and_token():
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, 123456789012345])
    positions = torch.tensor([0, 1, 7, 2**31, 2**32 - 1])
    tokens = torch.tensor([0, 1, 49151, 2**31])
    got = hash32(seeds, positions, tokens)
    assert got.dtype == torch.int32
    for row, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        for column, token in enumerate(tokens.tolist()):
            data = (
                (seed % 2**64).to_bytes(8, "little")
                + position.to_bytes(4, "little")
                + token.to_bytes(4, "little")
            )
            assert got[row, column].item() % 2**32 == murmur3(data)


def test_unsigned_seeds_give_the_hash_of_the_same_bits():
    signed, position, token = torch.tensor([-5]), torch.tensor([3]), torch.arange(4)
    assert torch.equal(hash32(signed.view(torch.uint64), position, token), hash32(signed, position, token))


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_samples_follow_the_distribution(vary):
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    count = 20_000
    numbers, same = torch.arange(count), torch.full((count,), 3)
    seeds, positions = (numbers, same) if vary == "seed" else (same, numbers)
    ids = sample_with_seed(probabilities.log().expand(count, -1), seeds, positions)
    assert ids.shape == (count, 1)
    share = torch.bincount(ids[:, 0], minlength=5) / count
    # five standard deviations of a share are at most 5 sqrt(0.25 / count) = 0.018
    assert torch.allclose(share, probabilities, atol=0.018)
    assert share[4] == 0


def test_a_sample_depends_on_its_own_row_only():
    log_probs = torch.randn(6, 100, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    seeds, positions = torch.arange(6) + 40, torch.arange(6) * 3
    together = sample_with_seed(log_probs, seeds, positions)
    alone = [sample_with_seed(log_probs[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))


def test_the_input_is_not_modified():
    log_probs = torch.randn(2, 9, dtype=torch.float64)
    before = log_probs.clone()
    sample_with_seed(log_probs, torch.tensor([1, 2]), torch.tensor([0, 0]))
    assert torch.equal(log_probs, before)
