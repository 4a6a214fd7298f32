"""The Triton back end: which kernel runs with which arguments, and where plain torch operations run instead.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from megatron_gkd.losses.divergences import JSD, TVD, Divergence, SkewForwardKL, SkewReverseKL, WeightedKL
from megatron_gkd.losses.kernels.eager import EagerKernels
from megatron_gkd.losses.kernels.interface import DenseKernels
from megatron_gkd.losses.vocab_parallel import numbers_per_row
from megatron_gkd.platform.compiler import has_triton, launching_on

TILE = 4096
"""Columns of one step of a kernel."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NUM_WARPS = 8


@dataclass(frozen=True, kw_only=True)
class TritonKernels(DenseKernels):
    """Kernels for float32, bfloat16 and float16 logits whose columns are adjacent; ``eager`` does the rest.

    The gradient computes everything again: nothing is kept in the storage of the logits.

    Attributes:
        eager: For float64, other strides, divergences without a formula here and, unless required, logits on a CPU.
        is_required: Raise ``ValueError`` for logits on a CPU or without Triton.
    """

    eager: EagerKernels
    is_required: bool

    @override
    def first(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        if not self._can_run(student_TV, teacher_TV):
            return self.eager.first(student_TV, teacher_TV)
        packed_TK = numbers_per_row(student_TV, self.num_first)
        kernel, flags = _kernels().normalizers, {}
        if isinstance(self.divergence, WeightedKL):
            kernel, flags = _kernels().kl_sums, _directions(self.divergence)
        self._launch(kernel, (student_TV.shape[0],), (student_TV, teacher_TV), (packed_TK,), **flags)
        return packed_TK

    @override
    def second(
        self, student_TV: Tensor, teacher_TV: Tensor, norms_T5: Tensor, *, overwrite: bool = False
    ) -> Tensor:
        if not self._can_run(student_TV, teacher_TV):
            return self.eager.second(student_TV, teacher_TV, norms_T5, overwrite=overwrite)
        sums_T2, (formula, weight) = numbers_per_row(student_TV, 2), _formula(self.divergence)
        grid, numbers = (student_TV.shape[0],), (norms_T5.contiguous(), sums_T2)
        self._launch(_kernels().entry_sums, grid, (student_TV, teacher_TV), numbers, weight, FORMULA=formula)
        return sums_T2

    @override
    def gradient(
        self, student_TV: Tensor, teacher_TV: Tensor, stats_TK: Tensor, grad_T: Tensor, out_TV: Tensor | None
    ) -> None:
        target_TV = student_TV if out_TV is None else out_TV
        if not self._can_run(student_TV, teacher_TV, target_TV):
            self.eager.gradient(student_TV, teacher_TV, stats_TK, grad_T, out_TV)
            return
        kl = self.divergence
        if isinstance(kl, WeightedKL):
            kernel, scalars, flags = _kernels().kl_gradient, (kl.forward, kl.reverse), _directions(kl)
        else:
            formula, weight = _formula(kl)
            kernel, scalars, flags = _kernels().entry_gradient, (weight,), {"FORMULA": formula}
        # one program for each tile of each row; a grid may be long along its first axis only
        grid = student_TV.shape[0], -(-student_TV.shape[1] // TILE)
        numbers = stats_TK.contiguous(), grad_T.contiguous()
        self._launch(
            kernel, grid, (student_TV, teacher_TV, target_TV), numbers, *map(float, scalars), **flags
        )

    def _can_run(self, student_TV: Tensor, *others: Tensor) -> bool:
        if self.is_required:
            _require_triton(student_TV)
        elif not student_TV.is_cuda:
            return False
        has_kernel = isinstance(self.divergence, WeightedKL) or _formula(self.divergence)[0] is not None
        pair = student_TV, others[0]
        return (
            has_kernel
            and all(z.dtype in _FLOATS for z in pair)
            and all(z.stride(-1) == 1 for z in (*pair, *others))
        )

    def _launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        logits: tuple[Tensor, ...],
        numbers: tuple[Tensor, ...],
        *scalars: float,
        **flags: Any,
    ) -> None:
        """Run (logits..., numbers..., columns, row strides of the logits, 1 / temperatures, scalars) on the logits' device."""
        if 0 in grid:
            return
        inverse = (1 / tau for tau in self.temperatures)
        sizes = logits[0].shape[1], *(z.stride(0) for z in logits)
        with launching_on(logits[0].device):
            # without fusion each product is rounded by itself, so that equal models give exactly 0
            kernel[grid](
                *logits,
                *numbers,
                *sizes,
                *inverse,
                *scalars,
                **flags,
                TILE=TILE,
                num_warps=_NUM_WARPS,
                enable_fp_fusion=False,
            )


def _directions(kl: WeightedKL) -> dict[str, int]:
    return {"FORWARD": int(kl.forward != 0), "REVERSE": int(kl.reverse != 0)}


def _formula(divergence: Divergence) -> tuple[str | None, float]:
    """Name and parameter of the divergence in ``triton_kernels``; no name: it has no kernel."""
    match divergence:
        case JSD(beta):
            return "jsd", beta
        case SkewForwardKL(alpha):
            return "skew_forward_kl", alpha
        case SkewReverseKL(alpha):
            return "skew_reverse_kl", alpha
        case TVD():
            return "tvd", 0.0
    return None, 0.0


def _require_triton(logits_TV: Tensor) -> None:
    if not has_triton():
        raise ValueError(
            "the loss back end triton needs the package triton; install it or set loss.backend=auto"
        )
    if not logits_TV.is_cuda and not _kernels().triton.knobs.runtime.interpret:
        raise ValueError(
            f"the loss back end triton needs logits on a GPU, these are on {logits_TV.device}; set loss.backend=auto"
        )


def _kernels() -> Any:
    """The module ``triton_kernels``, the only one that imports triton."""
    return importlib.import_module("megatron_gkd.losses.kernels.triton_kernels")
