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
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from typing_extensions import override

from megatron_gkd.losses.kernels import eager
from megatron_gkd.losses.kernels.eager import EagerKernels
from megatron_gkd.losses.kernels.interface import DenseKernels
from megatron_gkd.losses.vocab_parallel import numbers_per_row

_ELEMENTS_PER_PASS = 1 << 20
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class CompiledKernels(DenseKernels):
    """What cannot be fused (float64, a single row, an empty shard) goes to ``eager``; a pass has at least two rows."""

    eager: EagerKernels

    @override
    def first(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        if not _can_fuse(student_TV, teacher_TV):
            return self.eager.first(student_TV, teacher_TV)
        packed_TK = numbers_per_row(student_TV, self.num_first)
        how = (self.eager.first_pass, self.divergence, self.temperatures)
        self._run(_first, how, student_TV, teacher_TV, packed_TK)
        close_T = eager.close_rows(packed_TK, self.divergence)
        if close_T is not None:
            for rows in _row_passes(len(close_T), student_TV.shape[1], self.rows_per_pass):
                part_T = close_T[rows]
                close_TK, how = packed_TK[part_T], (self.divergence, self.temperatures)
                self._run(_close, how, student_TV[part_T], teacher_TV[part_T], close_TK)
                packed_TK[part_T] = close_TK
        return packed_TK

    @override
    def second(
        self, student_TV: Tensor, teacher_TV: Tensor, norms_T5: Tensor, *, overwrite: bool = False
    ) -> Tensor:
        if not _can_fuse(student_TV, teacher_TV):
            return self.eager.second(student_TV, teacher_TV, norms_T5, overwrite=overwrite)
        sums_T2, how = numbers_per_row(student_TV, 2), (overwrite, self.divergence, self.temperatures)
        self._run(_second, how, student_TV, teacher_TV, norms_T5.contiguous(), sums_T2)
        return sums_T2

    @override
    def gradient(
        self, student_TV: Tensor, teacher_TV: Tensor, stats_TK: Tensor, grad_T: Tensor, out_TV: Tensor | None
    ) -> None:
        first_TV = student_TV if out_TV is None else out_TV
        if not _can_fuse(student_TV, teacher_TV) or first_TV.dtype not in (student_TV.dtype, torch.float32):
            self.eager.gradient(student_TV, teacher_TV, stats_TK, grad_T, out_TV)
            return
        # what is compiled writes to its first tensor, which holds the student's logits: one compilation serves both a
        # gradient in their storage and one elsewhere
        source_TV = None if first_TV.data_ptr() == student_TV.data_ptr() else student_TV
        numbers = stats_TK.contiguous(), grad_T.contiguous()
        function = eager.assembled_ if out_TV is None else self.eager.gradient_pass
        how = (function, self.divergence, self.temperatures)
        self._run(_gradient, how, first_TV, teacher_TV, *numbers, source_TV=source_TV)

    def _run(
        self, function: Callable[..., None], how: tuple, *tensors: Tensor, source_TV: Tensor | None = None
    ) -> None:
        """Call the compiled ``function`` for some rows after the other; ``source_TV`` is copied to the first tensor before."""
        run, (first_TV, *others) = _compiled(function, *how), [tensor.detach() for tensor in tensors]
        # one state for all callers: what is compiled depends on gradients, and nothing is compiled in a dispatch mode
        with torch.no_grad(), _disable_current_modes():
            for rows in _row_passes(first_TV.shape[0], first_TV.shape[1], self.rows_per_pass):
                if source_TV is not None:
                    first_TV[rows] = source_TV[rows]
                run(first_TV[rows], *(tensor[rows] for tensor in others))


def _can_fuse(student_TV: Tensor, teacher_TV: Tensor) -> bool:
    # torch.compile specializes on a size of 1 and would compile again for it (torch 2.13)
    return (
        student_TV.device.type == "cpu"
        and student_TV.dtype in _FUSED_DTYPES
        and teacher_TV.dtype in _FUSED_DTYPES
        and min(student_TV.shape) > 1
    )


def _row_passes(num_rows: int, num_columns: int, rows_per_pass: int | None) -> Iterator[slice]:
    """Slices of at least two rows."""
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
    # each further compile thread would stay as a process with torch in its memory
    return torch.compile(own, dynamic=True, fullgraph=True, options={"compile_threads": 1})


def _first(student_TV, teacher_TV, out_TK, function, divergence, temperatures):
    out_TK.copy_(function(student_TV, teacher_TV, divergence, temperatures))


def _close(student_TV, teacher_TV, first_TK, kl, temperatures):
    first_TK.copy_(eager.close_kl_sums(student_TV, teacher_TV, first_TK, kl, temperatures))


def _second(student_TV, teacher_TV, norms_T5, out_T2, overwrite, divergence, temperatures):
    sums_T2, r_TV, q_TV = eager.entries(student_TV, teacher_TV, norms_T5, divergence, temperatures)
    out_T2.copy_(sums_T2)
    if overwrite:
        student_TV.copy_(r_TV)
        teacher_TV.copy_(q_TV)


def _gradient(student_TV, teacher_TV, stats_TK, grad_T, function, divergence, temperatures):
    grad_TV = function(student_TV, teacher_TV, stats_TK, grad_T, divergence, temperatures)
    if function is not eager.assembled_:  # which works in the storage of its first argument
        student_TV.copy_(grad_TV)
