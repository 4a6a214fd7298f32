"""Sampling with noise that depends on (seed, position, token id) only.

The batch and the state of a generator have no influence.

Gumbel-max (Gumbel 1954; Maddison et al. 2014, "A* Sampling"): argmax_v(log p_v + g_v) with independent standard Gumbel
g_v is a sample from p. The uniform numbers of g come from a hash, so samples are reproducible on any machine.

Shapes: B = sequences, V = vocabulary entries.
"""

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF
_CACHED_ELEMENTS = 1 << 16  # 512 KiB in float64: an L2 cache


def sample_with_seed(log_probs_BV: Tensor, seed_B: Tensor, position_B: Tensor) -> Tensor:
    """Sample one token id per row.

    Args:
        log_probs_BV: [B, V] log-probabilities up to a constant per row, -inf for excluded tokens. Not modified.
        seed_B: [B] seeds, int64 or uint64.
        position_B: [B] position of the sampled token in its sequence, any integer dtype.

    Returns:
        [B, 1] int64 column indices.
    """
    token_ids_V = torch.arange(log_probs_BV.shape[1], device=log_probs_BV.device)
    # blocks of rows keep the intermediate tensors in a CPU's cache
    num_rows = max(1, _CACHED_ELEMENTS // len(token_ids_V)) if log_probs_BV.is_cpu else len(log_probs_BV)
    parts = (log_probs_BV.split(num_rows), seed_B.split(num_rows), position_B.split(num_rows))
    return torch.cat([_sample_block(*part, token_ids_V) for part in zip(*parts, strict=True)])


def _sample_block(log_probs_BV: Tensor, seed_B: Tensor, position_B: Tensor, token_ids_V: Tensor) -> Tensor:
    bits_BV = hash32(seed_B, position_B, token_ids_V).to(torch.float64)
    # float64 and the half keep u strictly inside (0, 1); in float32 u rounds to 1, and its noise is infinite
    uniform_BV = bits_BV.add_(2.0**31 + 0.5).mul_(2.0**-32)
    minus_gumbel_BV = uniform_BV.log_().neg_().log_()  # g = -log(-log u)
    return (log_probs_BV.to(torch.float64) - minus_gumbel_BV).argmax(dim=1, keepdim=True)


def hash32(seed_B: Tensor, position_B: Tensor, token_ids_V: Tensor) -> Tensor:
    """MurmurHash3 (x86, 32 bit, hash seed 0) of (seed low, seed high, position, token id).

    Args:
        seed_B: [B] int64 or uint64.
        position_B: [B] integers; the low 32 bits count.
        token_ids_V: [V] integers; the low 32 bits count.

    Returns:
        [B, V] int32, the hash's 32 bits read as a signed number.
    """
    seed_B = seed_B.view(torch.int64) if seed_B.dtype == torch.uint64 else seed_B.to(torch.int64)
    words = (
        _as_int32(seed_B)[:, None],
        _as_int32(seed_B >> 32)[:, None],
        _as_int32(position_B)[:, None],
        _as_int32(token_ids_V)[None, :],
    )
    state = torch.zeros_like(words[0])
    for word in words:
        state = state ^ (_rotate_left(word * (0xCC9E2D51 - 2**32), 15) * 0x1B873593)
        state = _rotate_left(state, 13).mul_(5).add_(0xE6546B64 - 2**32)
    state ^= 4 * len(words)  # length in bytes
    for shift, factor in ((16, 0x85EBCA6B - 2**32), (13, 0xC2B2AE35 - 2**32)):
        state ^= _shift_right(state, shift)
        state *= factor
    return state ^ _shift_right(state, 16)


# torch has no uint32 arithmetic on all devices. int32 wraps in two's complement, so sums and products have the same bits;
# only the right shift differs. Constants of 2**31 and above are written as negative numbers.


def _as_int32(number: Tensor) -> Tensor:
    """The low 32 bits, read as a signed number."""
    low = number.to(torch.int64) & _LOW_32
    return torch.where(low > 0x7FFFFFFF, low - 2**32, low).to(torch.int32)


def _shift_right(word: Tensor, num_bits: int) -> Tensor:
    """Logical right shift of a signed word."""
    return (word >> num_bits) & (_LOW_32 >> num_bits)


def _rotate_left(word: Tensor, num_bits: int) -> Tensor:
    return (word << num_bits) | _shift_right(word, 32 - num_bits)
