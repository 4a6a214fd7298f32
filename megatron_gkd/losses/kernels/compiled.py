"""The passes of the eager back end, each fused into one loop by torch.compile, for CPUs.

Every pass is compiled once for a divergence, its temperatures and a number format, with sizes left open. A pass reads
logits once and allocates numbers per row only, so its rows are many: a call costs 30 us.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from megatron_gkd.losses.divergences import Divergence, WeightedKL
from megatron_gkd.losses.kernels import eager
from megatron_gkd.losses.kernels.eager import EAGER
from megatron_gkd.losses.softmax import Temperatures, numbers_per_row

_ELEMENTS_PER_PASS = 1 << 19
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CompiledKernels:
    """See ``DenseKernels``; what it cannot fuse (float64, a single row, an empty shard) goes to the eager back end.

    Attributes:
        rows_per_pass: Rows of one pass, at least two; ``None``: picked from the size of the vocabulary.
    """

    rows_per_pass: int | None = None

    name: ClassVar[str] = "compiled"

    def kl_sums(
        self, student_TV: Tensor, teacher_TV: Tensor, kl: WeightedKL, temperatures: Temperatures
    ) -> Tensor:
        """See ``DenseKernels``."""
        if not _can_fuse(student_TV, teacher_TV):
            return EAGER.kl_sums(student_TV, teacher_TV, kl, temperatures)
        packed_TK = numbers_per_row(student_TV, 4 + (kl.forward != 0) + (kl.reverse != 0))
        _run(self.rows_per_pass, _kl_sums, (kl, temperatures), student_TV, teacher_TV, packed_TK)
        return packed_TK

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
        if not _can_fuse(student_TV, teacher_TV) or not _can_hold(out_TV, student_TV):
            EAGER.write_kl_gradient(student_TV, teacher_TV, stats_T5, upstream_T, kl, temperatures, out_TV)
            return
        numbers = stats_T5.contiguous(), upstream_T.contiguous()
        _run(
            self.rows_per_pass,
            _kl_gradient_,
            (kl, temperatures),
            student_TV,
            teacher_TV,
            *numbers,
            out_TV=out_TV,
        )

    def normalizers(self, student_TV: Tensor, teacher_TV: Tensor, temperatures: Temperatures) -> Tensor:
        """See ``DenseKernels``."""
        if not _can_fuse(student_TV, teacher_TV):
            return EAGER.normalizers(student_TV, teacher_TV, temperatures)
        packed_T4 = numbers_per_row(student_TV, 4)
        _run(self.rows_per_pass, _normalizers, (temperatures,), student_TV, teacher_TV, packed_T4)
        return packed_T4

    def term_sums(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        norms_T4: Tensor,
        divergence: Divergence,
        temperatures: Temperatures,
    ) -> Tensor:
        """See ``DenseKernels``."""
        if not _can_fuse(student_TV, teacher_TV):
            return EAGER.term_sums(student_TV, teacher_TV, norms_T4, divergence, temperatures)
        sums_T2 = numbers_per_row(student_TV, 2)
        how = divergence, temperatures
        _run(self.rows_per_pass, _term_sums, how, student_TV, teacher_TV, norms_T4.contiguous(), sums_T2)
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
        if not _can_fuse(student_TV, teacher_TV) or not _can_hold(out_TV, student_TV):
            EAGER.write_gradient(
                student_TV, teacher_TV, stats_T5, upstream_T, divergence, temperatures, out_TV
            )
            return
        numbers = stats_T5.contiguous(), upstream_T.contiguous()
        _run(
            self.rows_per_pass,
            _gradient_,
            (divergence, temperatures),
            student_TV,
            teacher_TV,
            *numbers,
            out_TV=out_TV,
        )

    def term_sums_(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        norms_T4: Tensor,
        divergence: Divergence,
        temperatures: Temperatures,
    ) -> Tensor:
        """See ``DenseKernels``."""
        if not _can_fuse(student_TV, teacher_TV):
            return EAGER.term_sums_(student_TV, teacher_TV, norms_T4, divergence, temperatures)
        sums_T2 = numbers_per_row(student_TV, 2)
        how = divergence, temperatures
        _run(self.rows_per_pass, _term_sums_, how, student_TV, teacher_TV, norms_T4.contiguous(), sums_T2)
        return sums_T2

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
        if not _can_fuse(student_TV, teacher_TV):
            EAGER.write_gradient_(student_TV, teacher_TV, stats_T5, upstream_T, divergence, temperatures)
            return
        numbers = stats_T5.contiguous(), upstream_T.contiguous()
        _run(self.rows_per_pass, _assemble_, (temperatures,), student_TV, teacher_TV, *numbers)


COMPILED = CompiledKernels()


def _can_fuse(student_TV: Tensor, teacher_TV: Tensor) -> bool:
    # a size of 1 would be compiled again: torch.compile does not leave it open
    return (
        student_TV.device.type == "cpu"
        and student_TV.dtype in _FUSED_DTYPES
        and teacher_TV.dtype in _FUSED_DTYPES
        and min(student_TV.shape) > 1
    )


def _can_hold(out_TV: Tensor, student_TV: Tensor) -> bool:
    return out_TV.dtype == student_TV.dtype or out_TV.dtype == torch.float32


def _run(
    rows_per_pass: int | None,
    function: Callable[..., None],
    how: tuple[Any, ...],
    student_TV: Tensor,
    *others: Tensor,
    out_TV: Tensor | None = None,
) -> None:
    """Call the compiled ``function`` for some rows after the other.

    It may write to its tensors, which share no storage. With ``out_TV`` its first tensor is that, holding the student's
    logits: one compilation serves both a gradient in their storage and one elsewhere.
    """
    run = _compiled(function, *how)
    first_TV = student_TV.detach() if out_TV is None else out_TV.detach()
    tensors = [tensor.detach() for tensor in others]
    is_elsewhere = out_TV is not None and out_TV.data_ptr() != student_TV.data_ptr()
    # one state for all callers: what is compiled depends on gradients, and nothing is compiled inside a dispatch mode
    with torch.no_grad(), _disable_current_modes():
        for rows in _row_passes(student_TV, rows_per_pass):
            if is_elsewhere:
                first_TV[rows] = student_TV[rows]
            run(first_TV[rows], *(tensor[rows] for tensor in tensors))


def _row_passes(logits_TV: Tensor, rows_per_pass: int | None) -> Iterator[slice]:
    """Slices of at least two rows."""
    num_rows, num_columns = logits_TV.shape
    wanted = rows_per_pass or _ELEMENTS_PER_PASS // num_columns
    num_passes = max(1, num_rows // max(2, wanted))
    bounds = [num_rows * i // num_passes for i in range(num_passes + 1)]
    return (slice(*pair) for pair in pairwise(bounds))


@cache
def _compiled(function: Callable[..., None], *how: Any) -> Callable[..., None]:
    def run(*tensors: Tensor) -> None:
        function(*tensors, *how)

    # a code object of its own: torch.compile counts compilations, and gives up, by code object
    name = function.__name__.strip("_")
    own = FunctionType(run.__code__.replace(co_name=name), run.__globals__, name, None, run.__closure__)
    # threads other than this one would stay, each a process with torch in its memory
    return torch.compile(own, dynamic=True, fullgraph=True, options={"compile_threads": 1})


def _kl_sums(
    student_TV: Tensor, teacher_TV: Tensor, out_TK: Tensor, kl: WeightedKL, temperatures: Temperatures
) -> None:
    out_TK.copy_(eager.kl_sums(student_TV, teacher_TV, kl, temperatures))


def _kl_gradient_(
    student_TV: Tensor,
    teacher_TV: Tensor,
    stats_T5: Tensor,
    upstream_T: Tensor,
    kl: WeightedKL,
    temperatures: Temperatures,
) -> None:
    student_TV.copy_(eager.kl_gradient(student_TV, teacher_TV, stats_T5, upstream_T, kl, temperatures))


def _normalizers(student_TV: Tensor, teacher_TV: Tensor, out_T4: Tensor, temperatures: Temperatures) -> None:
    out_T4.copy_(eager.normalizers(student_TV, teacher_TV, temperatures))


def _term_sums(
    student_TV: Tensor,
    teacher_TV: Tensor,
    norms_T4: Tensor,
    out_T2: Tensor,
    divergence: Divergence,
    temperatures: Temperatures,
) -> None:
    sums_T2, _, _ = eager.terms(student_TV, teacher_TV, norms_T4, divergence, temperatures)
    out_T2.copy_(sums_T2)


def _term_sums_(
    student_TV: Tensor,
    teacher_TV: Tensor,
    norms_T4: Tensor,
    out_T2: Tensor,
    divergence: Divergence,
    temperatures: Temperatures,
) -> None:
    sums_T2, r_TV, q_TV = eager.terms(student_TV, teacher_TV, norms_T4, divergence, temperatures)
    out_T2.copy_(sums_T2)
    student_TV.copy_(r_TV)
    teacher_TV.copy_(q_TV)


def _gradient_(
    student_TV: Tensor,
    teacher_TV: Tensor,
    stats_T5: Tensor,
    upstream_T: Tensor,
    divergence: Divergence,
    temperatures: Temperatures,
) -> None:
    norms_T4, r_sum_T1 = stats_T5.split([4, 1], -1)
    _, r_TV, q_TV = eager.terms(student_TV, teacher_TV, norms_T4, divergence, temperatures)
    student_TV.copy_(eager.assemble_(r_TV, q_TV, r_sum_T1, upstream_T, temperatures))


def _assemble_(
    r_TV: Tensor, q_TV: Tensor, stats_T5: Tensor, upstream_T: Tensor, temperatures: Temperatures
) -> None:
    eager.assemble_(r_TV, q_TV, stats_T5[:, 4:], upstream_T, temperatures)
