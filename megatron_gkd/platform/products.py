"""Matrix products of half-precision factors with an fp32 result.

On CUDA, tensor cores accumulate half-precision products in fp32, and ``torch.addmm(..., out_dtype)`` (torch 2.10 or later)
returns the sum unrounded. On a CPU torch has no such product: half-precision factors are upcast block by block.

Shapes: M and N = rows and columns of the product, K = inner dimension.
"""

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)

# Rows or columns of a factor upcast at a time: bounds the fp32 copy of an output layer [V, H] to [4096, 4096].
_BLOCK = 4096


def as_factor(x: Tensor, partner: Tensor) -> Tensor:
    """Cast ``x`` to the dtype of ``partner`` on CUDA; unchanged on a CPU."""
    return x.to(partner.dtype) if rounds_factors(x.device) else x


def rounds_factors(device: torch.device) -> bool:
    """Whether ``as_factor`` rounds fp32 to the dtype of a half-precision partner."""
    # a CUDA GEMM takes two factors of one dtype
    return device.type == "cuda"


def matmul_into(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """Write left @ right into ``out``, accumulated in fp32 (fp64) and rounded to ``out.dtype`` once.

    Args:
        out: [M, N], fp32, fp64 or half precision.
        left: [M, K], in half precision or in the dtype of ``out``; see ``as_factor``.
        right: [K, N], likewise.
        add: Compute out += left @ right instead.
    """
    if left.dtype == right.dtype == out.dtype and (out.is_cuda or out.dtype not in _HALF):
        torch.addmm(out, left, right, beta=int(add), out=out)
    elif out.is_cuda:
        torch.addmm(out, left, right, out.dtype, beta=int(add), out=out)
    elif out.dtype in _HALF:
        # blocks are added up in fp32; adding them in half precision would round once per block
        sum_MN = out.float()
        _upcast_matmul_into(sum_MN, left, right, add)
        out.copy_(sum_MN)
    else:
        _upcast_matmul_into(out, left, right, add)


def _upcast_matmul_into(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    """Multiply block by block: columns of the result, then blocks of the inner dimension."""
    for columns in _blocks(right.shape[1]):
        for inner in _blocks(right.shape[0]):
            factors = left[:, inner].to(out.dtype), right[inner, columns].to(out.dtype)
            out[:, columns].addmm_(*factors, beta=int(add or inner.start > 0))


def _blocks(size: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, size)) for start in range(0, max(size, 1), _BLOCK)]
