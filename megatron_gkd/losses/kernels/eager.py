"""Plain torch operations, on pieces of rows that stay in the cache of a CPU.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_gkd.losses.divergences import Divergence, WeightedKL
from megatron_gkd.losses.elementwise import exp_, row_sum, times
from megatron_gkd.losses.softmax import (
    Temperatures,
    accumulation_dtype,
    local_max,
    numbers_per_row,
    row_pieces,
    shifted,
)


@dataclass(frozen=True)
class EagerKernels:
    """See ``DenseKernels``; r and q wait for the gradient in the storage of the two logits.

    Attributes:
        rows_per_pass: Rows of one pass; ``None``: as many as a CPU's cache holds.
    """

    rows_per_pass: int | None = None

    name: ClassVar[str] = "eager"

    def kl_sums(
        self, student_TV: Tensor, teacher_TV: Tensor, kl: WeightedKL, temperatures: Temperatures
    ) -> Tensor:
        """See ``DenseKernels``."""
        num_directions = (kl.forward != 0) + (kl.reverse != 0)
        packed_TK = numbers_per_row(student_TV, 4 + num_directions)
        for rows in row_pieces(student_TV, self.rows_per_pass):
            packed_TK[rows] = kl_sums(student_TV[rows], teacher_TV[rows], kl, temperatures)
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
        for rows in row_pieces(student_TV, self.rows_per_pass):
            out_TV[rows] = kl_gradient(
                student_TV[rows], teacher_TV[rows], stats_T5[rows], upstream_T[rows], kl, temperatures
            )

    def normalizers(self, student_TV: Tensor, teacher_TV: Tensor, temperatures: Temperatures) -> Tensor:
        """See ``DenseKernels``."""
        packed_T4 = numbers_per_row(student_TV, 4)
        for rows in row_pieces(student_TV, self.rows_per_pass):
            packed_T4[rows] = normalizers(student_TV[rows], teacher_TV[rows], temperatures)
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
        sums_T2 = numbers_per_row(student_TV, 2)
        for rows in row_pieces(student_TV, self.rows_per_pass):
            sums_T2[rows], _, _ = terms(
                student_TV[rows], teacher_TV[rows], norms_T4[rows], divergence, temperatures
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
        norms_T4, r_sum_T1 = stats_T5.split([4, 1], -1)
        for rows in row_pieces(student_TV, self.rows_per_pass):
            _, r_TV, q_TV = terms(
                student_TV[rows], teacher_TV[rows], norms_T4[rows], divergence, temperatures
            )
            out_TV[rows] = assemble_(r_TV, q_TV, r_sum_T1[rows], upstream_T[rows], temperatures)

    def term_sums_(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        norms_T4: Tensor,
        divergence: Divergence,
        temperatures: Temperatures,
    ) -> Tensor:
        """See ``DenseKernels``."""
        sums_T2 = numbers_per_row(student_TV, 2)
        for rows in row_pieces(student_TV, self.rows_per_pass):
            sums_T2[rows], student_TV[rows], teacher_TV[rows] = terms(
                student_TV[rows], teacher_TV[rows], norms_T4[rows], divergence, temperatures
            )
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
        for rows in row_pieces(student_TV, self.rows_per_pass):
            assemble_(student_TV[rows], teacher_TV[rows], stats_T5[rows, 4:], upstream_T[rows], temperatures)


EAGER = EagerKernels()


def kl_sums(student_TV: Tensor, teacher_TV: Tensor, kl: WeightedKL, temperatures: Temperatures) -> Tensor:
    """``DenseKernels.kl_sums`` of one piece."""
    max_x_T, max_y_T = _local_maxima(student_TV, teacher_TV)
    x_TV = shifted(student_TV, max_x_T.unsqueeze(-1), temperatures.student)
    y_TV = shifted(teacher_TV, max_y_T.unsqueeze(-1), temperatures.teacher)
    log_ratio_TV = y_TV - x_TV
    q_TV, p_TV = exp_(x_TV), exp_(y_TV)
    numbers = [max_x_T, row_sum(q_TV), max_y_T, row_sum(p_TV)]
    if kl.forward:
        numbers.append(row_sum(times(p_TV, log_ratio_TV)))
    if kl.reverse:
        numbers.append(row_sum(times(q_TV, log_ratio_TV)).neg_())
    return torch.stack(numbers, -1)


def kl_gradient(
    student_TV: Tensor,
    teacher_TV: Tensor,
    stats_T5: Tensor,
    upstream_T: Tensor,
    kl: WeightedKL,
    temperatures: Temperatures,
) -> Tensor:
    """``DenseKernels.write_kl_gradient`` of one piece, as a new tensor."""
    max_x_T1, sum_x_T1, max_y_T1, sum_y_T1, reverse_kl_T1 = stats_T5.split(1, -1)
    upstream_T1 = upstream_T.unsqueeze(-1) / temperatures.student
    x_TV = shifted(student_TV, max_x_T1, temperatures.student)
    y_TV = shifted(teacher_TV, max_y_T1, temperatures.teacher)
    log_ratio_TV = x_TV - y_TV if kl.reverse else None
    q_TV, p_TV, grad_TV = exp_(x_TV), exp_(y_TV), None
    if log_ratio_TV is not None:
        log_ratio_TV.add_(sum_y_T1.log() - sum_x_T1.log() - reverse_kl_T1)
        scale_T1 = kl.reverse * upstream_T1 / sum_x_T1 + poison(sum_x_T1, sum_y_T1)
        grad_TV = times(q_TV, log_ratio_TV).mul_(scale_T1)
    if kl.forward:
        # products and difference are rounded one by one: a fused multiply-add would not be 0 where p = q
        scale_T1 = kl.forward * upstream_T1
        difference_TV = q_TV.mul_(scale_T1 / sum_x_T1).sub_(p_TV.mul_(scale_T1 / sum_y_T1))
        grad_TV = difference_TV if grad_TV is None else grad_TV.add_(difference_TV)
    assert grad_TV is not None  # a WeightedKL has a direction
    return grad_TV


def normalizers(student_TV: Tensor, teacher_TV: Tensor, temperatures: Temperatures) -> Tensor:
    """``DenseKernels.normalizers`` of one piece."""
    numbers = []
    pair = student_TV, teacher_TV
    for logits_TV, max_T, tau in zip(pair, _local_maxima(*pair), temperatures, strict=True):
        numbers += [max_T, row_sum(exp_(shifted(logits_TV, max_T.unsqueeze(-1), tau)))]
    return torch.stack(numbers, -1)


def terms(
    student_TV: Tensor,
    teacher_TV: Tensor,
    norms_T4: Tensor,
    divergence: Divergence,
    temperatures: Temperatures,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sums of value and r [T, 2], r [T, V], q [T, V]) of one piece."""
    log_q_TV, log_p_TV = log_softmax_pair(student_TV, teacher_TV, norms_T4, temperatures)
    value_TV, r_TV = divergence(log_p_TV, log_q_TV)
    return torch.stack([row_sum(value_TV), row_sum(r_TV)], -1), r_TV, exp_(log_q_TV)


def assemble_(
    r_TV: Tensor, q_TV: Tensor, r_sum_T1: Tensor, upstream_T: Tensor, temperatures: Temperatures
) -> Tensor:
    """The gradient from r, q and E, in the storage of r."""
    scale_T1 = upstream_T.unsqueeze(-1) / temperatures.student
    return r_TV.addcmul_(q_TV, r_sum_T1, value=-1).mul_(scale_T1)


def log_softmax_pair(
    student_TV: Tensor, teacher_TV: Tensor, norms_T4: Tensor, temperatures: Temperatures
) -> tuple[Tensor, Tensor]:
    """New tensors (log q, log p) of this rank's shard."""
    max_x_T1, sum_x_T1, max_y_T1, sum_y_T1 = norms_T4.split(1, -1)
    log_q_TV = shifted(student_TV, max_x_T1, temperatures.student).sub_(sum_x_T1.log())
    log_p_TV = shifted(teacher_TV, max_y_T1, temperatures.teacher).sub_(sum_y_T1.log())
    return log_q_TV, log_p_TV


def poison(sum_x: Tensor, sum_y: Tensor) -> Tensor:
    """0, but NaN in a row whose logits hold NaN or +inf, or nothing above -inf: ``times`` drops those entries."""
    return 0.0 * (sum_x.log() + sum_y.log())


def _local_maxima(student_TV: Tensor, teacher_TV: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(student_TV.dtype)
    return local_max(student_TV).to(dtype), local_max(teacher_TV).to(dtype)
