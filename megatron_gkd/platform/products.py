"""Matrix products with factors of half precision whose result is float32, neither rounded to half precision on the way.

CUDA's tensor cores multiply two half-precision factors into a float32 sum, which ``out_dtype`` hands out unrounded. A CPU
has no such product in torch: there the half-precision factor is widened, a block at a time, and float32 is multiplied.

Shapes: M and N = rows and columns of a product, K = the dimension that is summed.
"""

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)

_BLOCK = 4096
"""Rows or columns of a factor that are widened at one time."""


def as_factor(x: Tensor, partner: Tensor) -> Tensor:
    """``x`` as it enters a product with ``partner``: in the partner's format on CUDA, which needs one for both."""
    return x.to(partner.dtype) if rounds_factors(x.device) else x


def rounds_factors(device: torch.device) -> bool:
    """Whether ``as_factor`` rounds float32 to the format of a partner in half precision."""
    return device.type == "cuda"


def matmul_into(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """Write left @ right, summed in the accumulation format and rounded to that of ``out`` once.

    Args:
        out: [M, N], float32, float64 or half precision.
        left: [M, K], in half precision or in the format of ``out``; see ``as_factor``.
        right: [K, N], likewise.
        add: out += left @ right instead.
    """
    if left.dtype == right.dtype == out.dtype and (out.is_cuda or out.dtype not in _HALF):
        torch.addmm(out, left, right, beta=int(add), out=out)
    elif out.is_cuda:
        torch.addmm(out, left, right, out.dtype, beta=int(add), out=out)
    elif out.dtype in _HALF:
        sum_MN = out.float()
        _widened_matmul_into(sum_MN, left, right, add)
        out.copy_(sum_MN)
    else:
        _widened_matmul_into(out, left, right, add)


def _widened_matmul_into(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    """Blocks of columns of the result, each a sum over blocks of the inner dimension."""
    for columns in _blocks(right.shape[1]):
        for inner in _blocks(right.shape[0]):
            factors = left[:, inner].to(out.dtype), right[inner, columns].to(out.dtype)
            out[:, columns].addmm_(*factors, beta=int(add or inner.start > 0))


def _blocks(size: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, size)) for start in range(0, max(size, 1), _BLOCK)]
