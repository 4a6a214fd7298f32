"""The Triton back end: which kernel runs with which arguments, and where plain torch operations run instead.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token.
"""

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.losses.divergences import Divergence, Separable, WeightedKL
from megatron_gkd.losses.kernels.eager import EAGER
from megatron_gkd.losses.kernels.interface import DenseKernels
from megatron_gkd.losses.softmax import Temperatures, numbers_per_row

FORMULAS = ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
"""``Separable.formula`` of the divergences that have a kernel."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 4096
_NUM_WARPS = 8


class TritonKernels:
    """See ``DenseKernels``, for float32, bfloat16 and float16 logits whose columns are adjacent.

    The gradient computes everything again: nothing waits for it in the storage of the logits.
    """

    def kl_sums(
        self, student_TV: Tensor, teacher_TV: Tensor, kl: WeightedKL, temperatures: Temperatures
    ) -> Tensor:
        """See ``DenseKernels``."""
        return _softmax_sums(student_TV, teacher_TV, temperatures, kl.forward != 0, kl.reverse != 0)

    def write_kl_gradient(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        stats_T5: Tensor,
        upstream_T: Tensor,
        kl: WeightedKL,
        temperatures: Temperatures,
        out_TV: Tensor,
    ) -> None:
        """See ``DenseKernels``."""
        if student_TV.numel() == 0:
            return
        _kernels().kl_gradient[_tiles(student_TV)](
            student_TV,
            teacher_TV,
            stats_T5.contiguous(),
            upstream_T.contiguous(),
            out_TV,
            *_layout(student_TV, teacher_TV, out_TV),
            *_inverse(temperatures),
            float(kl.forward),
            float(kl.reverse),
            FORWARD=int(kl.forward != 0),
            REVERSE=int(kl.reverse != 0),
            **_compilation(),
        )

    def normalizers(self, student_TV: Tensor, teacher_TV: Tensor, temperatures: Temperatures) -> Tensor:
        """See ``DenseKernels``."""
        return _softmax_sums(student_TV, teacher_TV, temperatures, forward=False, reverse=False)

    def term_sums(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        norms_T4: Tensor,
        divergence: Divergence,
        temperatures: Temperatures,
    ) -> Tensor:
        """See ``DenseKernels``."""
        sums_T2, (formula, weight) = numbers_per_row(student_TV, 2), _formula(divergence)
        if student_TV.shape[0] > 0:
            _kernels().term_sums[(student_TV.shape[0],)](
                student_TV,
                teacher_TV,
                norms_T4.contiguous(),
                sums_T2,
                *_layout(student_TV, teacher_TV),
                *_inverse(temperatures),
                weight,
                FORMULA=formula,
                **_compilation(),
            )
        return sums_T2

    def write_gradient(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        stats_T5: Tensor,
        upstream_T: Tensor,
        divergence: Divergence,
        temperatures: Temperatures,
        out_TV: Tensor,
    ) -> None:
        """See ``DenseKernels``."""
        if student_TV.numel() == 0:
            return
        formula, weight = _formula(divergence)
        _kernels().term_gradient[_tiles(student_TV)](
            student_TV,
            teacher_TV,
            stats_T5.contiguous(),
            upstream_T.contiguous(),
            out_TV,
            *_layout(student_TV, teacher_TV, out_TV),
            *_inverse(temperatures),
            weight,
            FORMULA=formula,
            **_compilation(),
        )

    term_sums_ = term_sums

    def write_gradient_(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        stats_T5: Tensor,
        upstream_T: Tensor,
        divergence: Divergence,
        temperatures: Temperatures,
    ) -> None:
        """See ``DenseKernels``."""
        self.write_gradient(
            student_TV, teacher_TV, stats_T5, upstream_T, divergence, temperatures, student_TV
        )


TRITON = TritonKernels()


@dataclass(frozen=True)
class TritonWherePossible:
    """``TRITON``, or another back end for what it does not do: float64, other strides, divergences without a formula there.

    Attributes:
        required: Raise ``ValueError`` for logits on a CPU or without Triton, instead of leaving these to the other too.
        otherwise: The other back end.
    """

    required: bool
    otherwise: DenseKernels = EAGER

    def kl_sums(
        self, student_TV: Tensor, teacher_TV: Tensor, kl: WeightedKL, temperatures: Temperatures
    ) -> Tensor:
        """See ``DenseKernels``."""
        kernels = self._choose(kl, student_TV, teacher_TV)
        return kernels.kl_sums(student_TV, teacher_TV, kl, temperatures)

    def write_kl_gradient(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        stats_T5: Tensor,
        upstream_T: Tensor,
        kl: WeightedKL,
        temperatures: Temperatures,
        out_TV: Tensor,
    ) -> None:
        """See ``DenseKernels``."""
        kernels = self._choose(kl, student_TV, teacher_TV, out_TV)
        kernels.write_kl_gradient(student_TV, teacher_TV, stats_T5, upstream_T, kl, temperatures, out_TV)

    def normalizers(self, student_TV: Tensor, teacher_TV: Tensor, temperatures: Temperatures) -> Tensor:
        """See ``DenseKernels``."""
        kernels = self._choose(None, student_TV, teacher_TV)
        return kernels.normalizers(student_TV, teacher_TV, temperatures)

    def term_sums(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        norms_T4: Tensor,
        divergence: Divergence,
        temperatures: Temperatures,
    ) -> Tensor:
        """See ``DenseKernels``."""
        kernels = self._choose(divergence, student_TV, teacher_TV)
        return kernels.term_sums(student_TV, teacher_TV, norms_T4, divergence, temperatures)

    def write_gradient(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        stats_T5: Tensor,
        upstream_T: Tensor,
        divergence: Divergence,
        temperatures: Temperatures,
        out_TV: Tensor,
    ) -> None:
        """See ``DenseKernels``."""
        kernels = self._choose(divergence, student_TV, teacher_TV, out_TV)
        kernels.write_gradient(student_TV, teacher_TV, stats_T5, upstream_T, divergence, temperatures, out_TV)

    def term_sums_(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        norms_T4: Tensor,
        divergence: Divergence,
        temperatures: Temperatures,
    ) -> Tensor:
        """See ``DenseKernels``."""
        kernels = self._choose(divergence, student_TV, teacher_TV)
        return kernels.term_sums_(student_TV, teacher_TV, norms_T4, divergence, temperatures)

    def write_gradient_(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        stats_T5: Tensor,
        upstream_T: Tensor,
        divergence: Divergence,
        temperatures: Temperatures,
    ) -> None:
        """See ``DenseKernels``; the same choice as in ``term_sums_``, which depends on the same things."""
        kernels = self._choose(divergence, student_TV, teacher_TV)
        kernels.write_gradient_(student_TV, teacher_TV, stats_T5, upstream_T, divergence, temperatures)

    def _choose(self, divergence: Divergence | None, student_TV: Tensor, *others: Tensor) -> DenseKernels:
        if self.required:
            _require_triton(student_TV)
        elif not student_TV.is_cuda or not _is_installed():
            return self.otherwise
        has_kernel = (
            divergence is None or isinstance(divergence, WeightedKL) or _formula(divergence)[0] in FORMULAS
        )
        pair = student_TV, others[0]
        fits = all(z.dtype in _FLOATS for z in pair) and all(z.stride(-1) == 1 for z in (*pair, *others))
        return TRITON if has_kernel and fits else self.otherwise


def _formula(divergence: Divergence) -> tuple[str | None, float]:
    """Name and parameter, or ``None`` and 0."""
    return (
        (divergence.formula, float(divergence.weight)) if isinstance(divergence, Separable) else (None, 0.0)
    )


def _require_triton(logits_TV: Tensor) -> None:
    if not _is_installed():
        raise ValueError(
            "the loss back end triton needs the package triton; install it or set loss.backend=auto"
        )
    if not logits_TV.is_cuda and not _is_interpreted():
        raise ValueError(
            f"the loss back end triton needs logits on a GPU, these are on {logits_TV.device}; set loss.backend=auto"
        )


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreted() -> bool:
    return _kernels().triton.knobs.runtime.interpret


def _kernels() -> Any:
    """The module ``triton_kernels``; only this imports triton."""
    return importlib.import_module("megatron_gkd.losses.kernels.triton_kernels")


def _softmax_sums(
    student_TV: Tensor, teacher_TV: Tensor, temperatures: Temperatures, forward: bool, reverse: bool
) -> Tensor:
    packed_TK = numbers_per_row(student_TV, 4 + forward + reverse)
    if student_TV.shape[0] > 0:
        _kernels().softmax_sums[(student_TV.shape[0],)](
            student_TV,
            teacher_TV,
            packed_TK,
            *_layout(student_TV, teacher_TV),
            *_inverse(temperatures),
            FORWARD=int(forward),
            REVERSE=int(reverse),
            **_compilation(),
        )
    return packed_TK


def _layout(student_TV: Tensor, *others: Tensor) -> tuple[int, ...]:
    """Columns, and the distance of two rows in each tensor."""
    return student_TV.shape[1], *(z.stride(0) for z in (student_TV, *others))


def _inverse(temperatures: Temperatures) -> tuple[float, float]:
    return 1 / temperatures.student, 1 / temperatures.teacher


def _tiles(logits_TV: Tensor) -> tuple[int, int]:
    """A program for each tile of each row; a grid may be long along its first axis only."""
    return logits_TV.shape[0], -(-logits_TV.shape[1] // _TILE)


def _compilation() -> dict[str, Any]:
    return {"TILE": _TILE, "num_warps": _NUM_WARPS, "enable_fp_fusion": False}
