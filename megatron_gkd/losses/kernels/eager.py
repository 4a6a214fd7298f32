"""Plain torch operations, on pieces of rows that stay in the cache of a CPU.

The functions of one piece are also what the compiled back end fuses.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from megatron_gkd.losses.divergences import Divergence, WeightedKL, kl_entries
from megatron_gkd.losses.kernels.interface import DenseKernels
from megatron_gkd.losses.vocab_parallel import (
    Temperatures,
    accumulation_dtype,
    exp_,
    local_max,
    nan_if_not_positive,
    numbers_per_row,
    row_pieces,
    row_sum,
    shifted,
    times_,
)

_CLOSE_KL = 1 / 8
"""A KL below is summed from second-order terms; above, the rounding of first-order ones is a small relative error."""


@dataclass(frozen=True)
class EagerKernels(DenseKernels):
    """``second`` may keep r and q in the storage of the two logits."""

    @cached_property
    def first_pass(self) -> Callable[..., Tensor]:
        """The function of one piece behind ``first``."""
        return kl_sums if isinstance(self.divergence, WeightedKL) else normalizers

    @cached_property
    def gradient_pass(self) -> Callable[..., Tensor]:
        """The function of one piece behind ``gradient``."""
        return kl_gradient if isinstance(self.divergence, WeightedKL) else entry_gradient

    @override
    def first(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        first_TK, how = numbers_per_row(student_TV, self.num_first), (self.divergence, self.temperatures)
        for rows in row_pieces(student_TV, self.rows_per_pass):
            x_TV, y_TV, of_piece_TK = student_TV[rows], teacher_TV[rows], first_TK[rows]
            of_piece_TK.copy_(self.first_pass(x_TV, y_TV, *how))
            close_T = close_rows(of_piece_TK, self.divergence)
            if close_T is not None:
                close = x_TV[close_T], y_TV[close_T], of_piece_TK[close_T]
                of_piece_TK[close_T] = close_kl_sums(*close, *how)
        return first_TK

    @override
    def second(
        self, student_TV: Tensor, teacher_TV: Tensor, norms_T5: Tensor, *, overwrite: bool = False
    ) -> Tensor:
        sums_T2 = numbers_per_row(student_TV, 2)
        for rows in row_pieces(student_TV, self.rows_per_pass):
            logits = student_TV[rows], teacher_TV[rows]
            sums_T2[rows], r_TV, q_TV = entries(*logits, norms_T5[rows], self.divergence, self.temperatures)
            if overwrite:
                student_TV[rows], teacher_TV[rows] = r_TV, q_TV
        return sums_T2

    @override
    def gradient(
        self, student_TV: Tensor, teacher_TV: Tensor, stats_TK: Tensor, grad_T: Tensor, out_TV: Tensor | None
    ) -> None:
        gradient = assembled_ if out_TV is None else self.gradient_pass
        out_TV = student_TV if out_TV is None else out_TV
        for rows in row_pieces(student_TV, self.rows_per_pass):
            numbers = stats_TK[rows], grad_T[rows]
            out_TV[rows] = gradient(
                student_TV[rows], teacher_TV[rows], *numbers, self.divergence, self.temperatures
            )


def normalizers(
    student_TV: Tensor, teacher_TV: Tensor, divergence: Divergence | None, temperatures: Temperatures
) -> Tensor:
    """``DenseKernels.first`` of any divergence that is no weighted KL, for one piece."""
    max_x_T, max_y_T, x_TV, y_TV = _shifted_pair(student_TV, teacher_TV, temperatures)
    at_max_T = torch.full_like(max_x_T, -torch.inf)
    if x_TV.shape[-1]:  # x is 0 at its max, where several entries may be: all others are out of reach
        at_max_T = torch.add(teacher_TV, x_TV, alpha=1e38).amax(-1)
    numbers = max_x_T, row_sum(exp_(x_TV)), max_y_T, row_sum(exp_(y_TV)), at_max_T.to(max_x_T.dtype)
    return torch.stack(numbers, -1)


def kl_sums(student_TV: Tensor, teacher_TV: Tensor, kl: WeightedKL, temperatures: Temperatures) -> Tensor:
    """``DenseKernels.first`` of a weighted KL, for one piece; small KLs lose digits."""
    max_x_T, max_y_T, x_TV, y_TV = _shifted_pair(student_TV, teacher_TV, temperatures)
    d_TV = y_TV - x_TV
    q_TV, p_TV = exp_(x_TV), exp_(y_TV)
    sum_x_T, sum_y_T = row_sum(q_TV), row_sum(p_TV)
    numbers, shift_T = [max_x_T, sum_x_T, max_y_T, sum_y_T], (sum_x_T / sum_y_T).log()
    if kl.forward:
        forward_TV = d_TV.clone() if kl.reverse else d_TV
        numbers.append(row_sum(times_(forward_TV, p_TV)) / sum_y_T + shift_T)
    if kl.reverse:
        numbers.append(-row_sum(times_(d_TV, q_TV)) / sum_x_T - shift_T)
    return torch.stack(numbers, -1)


def close_kl_sums(
    student_TV: Tensor, teacher_TV: Tensor, first_TK: Tensor, kl: Any, temperatures: Temperatures
) -> Tensor:
    """``kl_sums`` again, of rows where ``first_TK`` has lost digits: see ``divergences.kl_entries``."""
    max_x_T1, sum_x_T1, max_y_T1, sum_y_T1 = first_TK[:, :4].split(1, -1)
    x_TV = shifted(student_TV, max_x_T1, temperatures.student)
    y_TV = shifted(teacher_TV, max_y_T1, temperatures.teacher)
    d_TV = (y_TV - x_TV).add_((sum_x_T1 / sum_y_T1).log())
    q_TV, p_TV = exp_(x_TV).div_(sum_x_T1), exp_(y_TV).div_(sum_y_T1)
    numbers = [first_TK[:, :4]]
    if kl.forward:
        numbers.append(row_sum(kl_entries(p_TV, q_TV, -d_TV, d_TV)).unsqueeze(-1))
    if kl.reverse:
        numbers.append(row_sum(kl_entries(q_TV, p_TV, d_TV, -d_TV)).unsqueeze(-1))
    return torch.cat(numbers, -1)


def close_rows(first_TK: Tensor, divergence: Divergence) -> Tensor | None:
    """Rows of ``kl_sums`` whose KL is so small that it has lost digits, a single one twice; ``None``: there are none."""
    if not isinstance(divergence, WeightedKL) or not (is_close_T := first_TK[:, 4] < _CLOSE_KL).any():
        return None
    close_T = is_close_T.nonzero().squeeze(-1)
    return close_T.expand(2) if len(close_T) == 1 else close_T  # compiled passes need two


def entries(
    student_TV: Tensor,
    teacher_TV: Tensor,
    norms_T5: Tensor,
    divergence: Divergence,
    temperatures: Temperatures,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sums of value and r [T, 2], r [T, V], q [T, V]) of one piece."""
    log_q_TV, log_p_TV = log_softmax_pair(student_TV, teacher_TV, norms_T5[:, :4], temperatures)
    value_TV, r_TV = divergence(log_p_TV, log_q_TV, norms_T5[:, 4:5])
    return torch.stack([row_sum(value_TV), row_sum(r_TV)], -1), r_TV, exp_(log_q_TV)


def assembled_(
    r_TV: Tensor,
    q_TV: Tensor,
    stats_T6: Tensor,
    grad_T: Tensor,
    divergence: Divergence,
    temperatures: Temperatures,
) -> Tensor:
    """Gradient from r, q and E, in the storage of r."""
    scale_T1 = grad_T.unsqueeze(-1) / temperatures.student
    return r_TV.addcmul_(q_TV, stats_T6[:, 5:], value=-1).mul_(scale_T1)


def entry_gradient(
    student_TV: Tensor,
    teacher_TV: Tensor,
    stats_T6: Tensor,
    grad_T: Tensor,
    divergence: Divergence,
    temperatures: Temperatures,
) -> Tensor:
    """``DenseKernels.gradient`` of any divergence that is no weighted KL, for one piece, as a new tensor."""
    _, r_TV, q_TV = entries(student_TV, teacher_TV, stats_T6[:, :5], divergence, temperatures)
    return assembled_(r_TV, q_TV, stats_T6, grad_T, divergence, temperatures)


def kl_gradient(
    student_TV: Tensor,
    teacher_TV: Tensor,
    stats_T5: Tensor,
    grad_T: Tensor,
    kl: WeightedKL,
    temperatures: Temperatures,
) -> Tensor:
    """``DenseKernels.gradient`` of a weighted KL, for one piece, as a new tensor."""
    max_x_T1, sum_x_T1, max_y_T1, sum_y_T1, shift_T1 = stats_T5.split(1, -1)
    grad_T1 = grad_T.unsqueeze(-1) / temperatures.student
    x_TV = shifted(student_TV, max_x_T1, temperatures.student)
    y_TV = shifted(teacher_TV, max_y_T1, temperatures.teacher)
    log_ratio_TV = x_TV - y_TV if kl.reverse else None
    q_TV, p_TV, grad_TV = exp_(x_TV), exp_(y_TV), None
    if log_ratio_TV is not None:
        log_ratio_TV.add_(shift_T1)
        scale_T1 = kl.reverse * grad_T1 / sum_x_T1 + nan_if_not_positive(sum_x_T1, sum_y_T1)
        grad_TV = times_(log_ratio_TV, q_TV).mul_(scale_T1)
    if kl.forward:
        # products and difference are rounded one by one: a fused multiply-add would not be 0 where p = q
        scale_T1 = kl.forward * grad_T1
        difference_TV = q_TV.mul_(scale_T1 / sum_x_T1).sub_(p_TV.mul_(scale_T1 / sum_y_T1))
        grad_TV = difference_TV if grad_TV is None else grad_TV.add_(difference_TV)
    assert grad_TV is not None  # a WeightedKL has a direction
    return grad_TV


def log_softmax_pair(
    student_TV: Tensor, teacher_TV: Tensor, norms_T4: Tensor, temperatures: Temperatures
) -> tuple[Tensor, Tensor]:
    """New tensors (log q, log p) of this rank's shard."""
    max_x_T1, sum_x_T1, max_y_T1, sum_y_T1 = norms_T4.split(1, -1)
    log_q_TV = shifted(student_TV, max_x_T1, temperatures.student).sub_(sum_x_T1.log())
    log_p_TV = shifted(teacher_TV, max_y_T1, temperatures.teacher).sub_(sum_y_T1.log())
    return log_q_TV, log_p_TV


def _shifted_pair(
    student_TV: Tensor, teacher_TV: Tensor, temperatures: Temperatures
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(max of x, max of y, new tensors x - max, y - max, divided by the temperatures)."""
    dtype = accumulation_dtype(student_TV.dtype)
    max_x_T, max_y_T = local_max(student_TV).to(dtype), local_max(teacher_TV).to(dtype)
    x_TV = shifted(student_TV, max_x_T.unsqueeze(-1), temperatures.student)
    y_TV = shifted(teacher_TV, max_y_T.unsqueeze(-1), temperatures.teacher)
    return max_x_T, max_y_T, x_TV, y_TV
