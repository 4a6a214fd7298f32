"""Plain torch operations, on pieces of rows that stay in the cache of a CPU.

The functions of one piece are also what the compiled back end fuses.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from typing_extensions import override

from megatron_gkd.losses.divergences import Divergence, WeightedKL
from megatron_gkd.losses.kernels.interface import DenseKernels
from megatron_gkd.losses.vocab_parallel import (
    Temperatures,
    accumulation_dtype,
    exp_,
    expm1,
    local_max,
    nan_if_not_positive,
    numbers_per_row,
    row_pieces,
    row_sum,
    shifted,
    times,
)


@dataclass(frozen=True)
class EagerKernels(DenseKernels):
    """``second`` may keep r and q in the storage of the two logits."""

    @override
    def first(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        packed_TK = numbers_per_row(student_TV, self.num_first)
        first = first_pass(self.divergence)
        for rows in row_pieces(student_TV, self.rows_per_pass):
            packed_TK[rows] = first(student_TV[rows], teacher_TV[rows], self.divergence, self.temperatures)
        return packed_TK

    @override
    def second(
        self, student_TV: Tensor, teacher_TV: Tensor, norms_T5: Tensor, *, overwrite: bool = False
    ) -> Tensor:
        sums_T2 = numbers_per_row(student_TV, 2)
        for rows in row_pieces(student_TV, self.rows_per_pass):
            x_TV, y_TV = student_TV[rows], teacher_TV[rows]
            sums_T2[rows], r_TV, q_TV = entries(
                x_TV, y_TV, norms_T5[rows], self.divergence, self.temperatures
            )
            if overwrite:
                x_TV.copy_(r_TV)
                y_TV.copy_(q_TV)
        return sums_T2

    @override
    def gradient(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        stats_TK: Tensor,
        upstream_T: Tensor,
        out_TV: Tensor,
        *,
        is_overwritten: bool = False,
    ) -> None:
        gradient = gradient_pass(self.divergence, is_overwritten=is_overwritten)
        for rows in row_pieces(student_TV, self.rows_per_pass):
            numbers = stats_TK[rows], upstream_T[rows]
            out_TV[rows] = gradient(
                student_TV[rows], teacher_TV[rows], *numbers, self.divergence, self.temperatures
            )


def normalizers(
    student_TV: Tensor, teacher_TV: Tensor, divergence: Divergence | None, temperatures: Temperatures
) -> Tensor:
    """``DenseKernels.first`` of any divergence that is no weighted KL, for one piece."""
    max_x_T, max_y_T, x_TV, y_TV = _shifted_pair(student_TV, teacher_TV, temperatures)
    # several entries may share the max: every rank takes the largest of their teacher logits
    at_max_TV = torch.where(x_TV == 0, teacher_TV, -torch.inf)
    at_max_T = at_max_TV.amax(-1) if at_max_TV.shape[-1] else torch.full_like(max_x_T, -torch.inf)
    numbers = max_x_T, row_sum(exp_(x_TV)), max_y_T, row_sum(exp_(y_TV)), at_max_T.to(max_x_T.dtype)
    return torch.stack(numbers, -1)


def kl_sums(student_TV: Tensor, teacher_TV: Tensor, kl: WeightedKL, temperatures: Temperatures) -> Tensor:
    """``DenseKernels.first`` of a weighted KL, for one piece."""
    max_x_T, max_y_T, x_TV, y_TV = _shifted_pair(student_TV, teacher_TV, temperatures)
    d_TV = y_TV - x_TV
    q_TV, p_TV = exp_(x_TV), exp_(y_TV)
    sum_x_T, sum_y_T = row_sum(q_TV), row_sum(p_TV)
    is_near_TV = d_TV.abs() < 1
    growth_TV = expm1(-d_TV)
    # e^x - e^y: of near entries by expm1, for the difference of two rounded numbers has few digits
    difference_TV = torch.where(is_near_TV, p_TV * growth_TV, q_TV - p_TV)
    difference_T = row_sum(difference_TV)
    numbers = [max_x_T, max_y_T, torch.minimum(sum_x_T, sum_y_T), difference_T]
    if kl.forward:
        cross_TV = times(p_TV, d_TV)
        small_TV = torch.where(is_near_TV, p_TV * (d_TV + growth_TV), cross_TV + difference_TV)
        numbers.append(torch.where(difference_T <= sum_y_T, row_sum(small_TV), row_sum(cross_TV)))
    if kl.reverse:
        cross_TV = times(q_TV, d_TV).neg_()
        small_TV = torch.where(is_near_TV, q_TV * (expm1(d_TV) - d_TV), cross_TV - difference_TV)
        numbers.append(torch.where(-difference_T <= sum_x_T, row_sum(small_TV), row_sum(cross_TV)))
    return torch.stack(numbers, -1)


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
    upstream_T: Tensor,
    divergence: Divergence,
    temperatures: Temperatures,
) -> Tensor:
    """Gradient from r, q and E, in the storage of r."""
    scale_T1 = upstream_T.unsqueeze(-1) / temperatures.student
    return r_TV.addcmul_(q_TV, stats_T6[:, 5:], value=-1).mul_(scale_T1)


def entry_gradient(
    student_TV: Tensor,
    teacher_TV: Tensor,
    stats_T6: Tensor,
    upstream_T: Tensor,
    divergence: Divergence,
    temperatures: Temperatures,
) -> Tensor:
    """``DenseKernels.gradient`` of any divergence that is no weighted KL, for one piece, as a new tensor."""
    _, r_TV, q_TV = entries(student_TV, teacher_TV, stats_T6[:, :5], divergence, temperatures)
    return assembled_(r_TV, q_TV, stats_T6, upstream_T, divergence, temperatures)


def kl_gradient(
    student_TV: Tensor,
    teacher_TV: Tensor,
    stats_T5: Tensor,
    upstream_T: Tensor,
    kl: WeightedKL,
    temperatures: Temperatures,
) -> Tensor:
    """``DenseKernels.gradient`` of a weighted KL, for one piece, as a new tensor."""
    max_x_T1, sum_x_T1, max_y_T1, sum_y_T1, shift_T1 = stats_T5.split(1, -1)
    upstream_T1 = upstream_T.unsqueeze(-1) / temperatures.student
    x_TV = shifted(student_TV, max_x_T1, temperatures.student)
    y_TV = shifted(teacher_TV, max_y_T1, temperatures.teacher)
    log_ratio_TV = x_TV - y_TV if kl.reverse else None
    q_TV, p_TV, grad_TV = exp_(x_TV), exp_(y_TV), None
    if log_ratio_TV is not None:
        log_ratio_TV.add_(shift_T1)
        scale_T1 = kl.reverse * upstream_T1 / sum_x_T1 + nan_if_not_positive(sum_x_T1, sum_y_T1)
        grad_TV = times(q_TV, log_ratio_TV).mul_(scale_T1)
    if kl.forward:
        # products and difference are rounded one by one: a fused multiply-add would not be 0 where p = q
        scale_T1 = kl.forward * upstream_T1
        difference_TV = q_TV.mul_(scale_T1 / sum_x_T1).sub_(p_TV.mul_(scale_T1 / sum_y_T1))
        grad_TV = difference_TV if grad_TV is None else grad_TV.add_(difference_TV)
    assert grad_TV is not None  # a WeightedKL has a direction
    return grad_TV


@cache
def first_pass(divergence: Divergence) -> Callable[..., Tensor]:
    """The function of one piece behind ``DenseKernels.first``."""
    return kl_sums if isinstance(divergence, WeightedKL) else normalizers


@cache
def gradient_pass(divergence: Divergence, *, is_overwritten: bool) -> Callable[..., Tensor]:
    """The function of one piece behind ``DenseKernels.gradient``."""
    if is_overwritten:
        return assembled_
    return kl_gradient if isinstance(divergence, WeightedKL) else entry_gradient


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
