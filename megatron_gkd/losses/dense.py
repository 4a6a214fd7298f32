"""Divergences between two models' logits over a split vocabulary.

x and y are the student's and the teacher's logits divided by their temperatures, M and S the max and the sum of
exp(logit - max) over the whole vocabulary.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token, R = ranks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.losses.comparison import Comparison, Rounds, communicate, joined_rows
from megatron_gkd.losses.divergences import Divergence, WeightedKL
from megatron_gkd.losses.elementwise import exp_, times
from megatron_gkd.losses.softmax import (
    SoftmaxStats,
    accumulation_dtype,
    local_max,
    numbers_per_row,
    row_blocks,
    row_pieces,
    shifted,
)


class Temperatures(NamedTuple):
    """What the two models' logits are divided by."""

    student: float
    teacher: float


@dataclass(frozen=True)
class OneRound(Comparison):
    """A weighted sum of forward and reverse KL, with one all-gather of five numbers per token (six if both occur).

    Each rank contributes m and s, its own max and sum of exp, of both models, and of the forward direction
    A = sum_v e^(y - m_y) [(y - m_y) - (x - m_x)]. With A* = sum over ranks of
    (A + s_y [(m_y - M_y) - (m_x - M_x)]) e^(m_y - M_y):  KL(p || q) = A* / S_y - log S_y + log S_x.
    The reverse direction exchanges x and y.
    """

    divergence: WeightedKL
    temperatures: Temperatures

    def rounds(self, student_TV: Tensor, teacher_TV: Tensor) -> Rounds:
        """See ``Comparison``; stats = M_x, S_x, M_y, S_y, KL(q || p) (0 where it is not used)."""
        num_directions = (self.divergence.forward != 0) + (self.divergence.reverse != 0)
        packed_TK = numbers_per_row(student_TV, 4 + num_directions)
        for rows in row_pieces(student_TV):
            packed_TK[rows] = self._local_sums(student_TV[rows], teacher_TV[rows])
        return self._combine((yield packed_TK))

    def num_stats(self, teacher_TV: Tensor) -> int:
        """Four normalizers and the KL."""
        return 5

    def gradient(
        self, student_TV: Tensor, teacher_TV: Tensor, stats_TK: Tensor, upstream_T: Tensor
    ) -> Tensor:
        """(forward (q - p) + reverse q (log q - log p - KL(q || p))) / temperature."""
        max_x_T1, sum_x_T1, max_y_T1, sum_y_T1, reverse_kl_T1 = stats_TK.split(1, -1)
        upstream_T1 = upstream_T.unsqueeze(-1) / self.temperatures.student
        x_TV = shifted(student_TV, max_x_T1, self.temperatures.student)
        y_TV = shifted(teacher_TV, max_y_T1, self.temperatures.teacher)
        log_ratio_TV = x_TV - y_TV if self.divergence.reverse else None
        q_TV, p_TV, grad_TV = exp_(x_TV), exp_(y_TV), None
        if log_ratio_TV is not None:
            log_ratio_TV.add_(sum_y_T1.log() - sum_x_T1.log() - reverse_kl_T1)
            scale_T1 = self.divergence.reverse * upstream_T1 / sum_x_T1 + _poison(sum_x_T1, sum_y_T1)
            grad_TV = times(q_TV, log_ratio_TV).mul_(scale_T1)
        if self.divergence.forward:
            # products and difference are rounded one by one: a fused multiply-add would not be 0 where p = q
            scale_T1 = self.divergence.forward * upstream_T1
            difference_TV = q_TV.mul_(scale_T1 / sum_x_T1).sub_(p_TV.mul_(scale_T1 / sum_y_T1))
            grad_TV = difference_TV if grad_TV is None else grad_TV.add_(difference_TV)
        assert grad_TV is not None  # a WeightedKL has a direction
        return grad_TV

    def _local_sums(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        max_x_T, max_y_T = _local_maxima(student_TV, teacher_TV)
        x_TV = shifted(student_TV, max_x_T.unsqueeze(-1), self.temperatures.student)
        y_TV = shifted(teacher_TV, max_y_T.unsqueeze(-1), self.temperatures.teacher)
        log_ratio_TV = y_TV - x_TV
        q_TV, p_TV = exp_(x_TV), exp_(y_TV)
        numbers = [max_x_T, q_TV.sum(-1), max_y_T, p_TV.sum(-1)]
        if self.divergence.forward:
            numbers.append(times(p_TV, log_ratio_TV).sum(-1))
        if self.divergence.reverse:
            numbers.append(times(q_TV, log_ratio_TV).sum(-1).neg_())
        return torch.stack(numbers, -1)

    def _combine(self, packed_RTK: Tensor) -> tuple[Tensor, Tensor]:
        max_x_RT, sum_x_RT, max_y_RT, sum_y_RT, *cross = packed_RTK.unbind(-1)
        student = SoftmaxStats.merged(max_x_RT, sum_x_RT, self.temperatures.student)
        teacher = SoftmaxStats.merged(max_y_RT, sum_y_RT, self.temperatures.teacher)
        far_x_RT = (max_x_RT - student.max_T) / self.temperatures.student
        far_y_RT = (max_y_RT - teacher.max_T) / self.temperatures.teacher
        log_normalizers_T = teacher.sumexp_T.log() - student.sumexp_T.log()
        loss_T = reverse_kl_T = torch.zeros_like(student.max_T)
        if self.divergence.forward:
            total_RT = times(far_y_RT.exp(), cross[0] + times(sum_y_RT, far_y_RT - far_x_RT))
            loss_T = self.divergence.forward * (total_RT.sum(0) / teacher.sumexp_T - log_normalizers_T)
        if self.divergence.reverse:
            total_RT = times(far_x_RT.exp(), cross[-1] + times(sum_x_RT, far_x_RT - far_y_RT))
            reverse_kl_T = total_RT.sum(0) / student.sumexp_T + log_normalizers_T
            loss_T = loss_T + self.divergence.reverse * reverse_kl_T
        return loss_T, torch.stack([*student, *teacher, reverse_kl_T], -1)


@dataclass(frozen=True)
class TwoRounds(Comparison):
    """Any divergence, with two dependent all-gathers: four numbers per token (the normalizers), then two sums.

    Two are the floor for a mixture of p and q, whose logarithm needs both normalizers first.
    """

    divergence: Divergence
    temperatures: Temperatures

    def rounds(self, student_TV: Tensor, teacher_TV: Tensor) -> Rounds:
        """See ``Comparison``; stats = M_x, S_x, M_y, S_y, E = sum_v r_v."""
        return self._rounds(student_TV, teacher_TV, overwrite=False)

    def num_stats(self, teacher_TV: Tensor) -> int:
        """Four normalizers and E."""
        return 5

    def gradient(
        self, student_TV: Tensor, teacher_TV: Tensor, stats_TK: Tensor, upstream_T: Tensor
    ) -> Tensor:
        """(r - q E) / temperature."""
        norms_TK, r_sum_T1 = stats_TK.split([4, 1], -1)
        _, r_TV, q_TV = self._terms(student_TV, teacher_TV, norms_TK)
        return self._assemble(r_TV, q_TV, r_sum_T1, upstream_T)

    def differentiate_(
        self, student_TV: Tensor, teacher_TV: Tensor, upstream_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Comparison``; r and q wait for the second round in the storage of the two logits."""
        parts = []
        for block in row_blocks(student_TV, self.group):
            x_TV, y_TV, block_upstream_T = student_TV[block], teacher_TV[block], upstream_T[block]
            loss_T, stats_TK = communicate(self._rounds(x_TV, y_TV, overwrite=True), self.group)
            for rows in row_pieces(x_TV):
                self._assemble(x_TV[rows], y_TV[rows], stats_TK[rows, 4:], block_upstream_T[rows])
            parts.append((loss_T, stats_TK))
        return joined_rows(parts)

    def _rounds(self, student_TV: Tensor, teacher_TV: Tensor, *, overwrite: bool) -> Rounds:
        packed_RTK = yield local_normalizers(student_TV, teacher_TV, self.temperatures)
        norms_TK = merged_normalizers(packed_RTK, self.temperatures)
        sums_T2 = numbers_per_row(student_TV, 2)
        for rows in row_pieces(student_TV):
            sums_T2[rows], r_TV, q_TV = self._terms(student_TV[rows], teacher_TV[rows], norms_TK[rows])
            if overwrite:
                student_TV[rows], teacher_TV[rows] = r_TV, q_TV
        # gathered and added in the order of ranks, so that all of them hold the same bits
        loss_T, r_sum_T = (yield sums_T2).sum(0).unbind(-1)
        poison_T = _poison(norms_TK[:, 1], norms_TK[:, 3])
        return loss_T + poison_T, torch.cat([norms_TK, (r_sum_T + poison_T).unsqueeze(-1)], -1)

    def _terms(
        self, student_TV: Tensor, teacher_TV: Tensor, norms_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(local sums of value and r [T, 2], r [T, V], q [T, V])."""
        log_q_TV, log_p_TV = log_softmax_pair(student_TV, teacher_TV, norms_TK, self.temperatures)
        value_TV, r_TV = self.divergence(log_p_TV, log_q_TV)
        return torch.stack([value_TV.sum(-1), r_TV.sum(-1)], -1), r_TV, exp_(log_q_TV)

    def _assemble(self, r_TV: Tensor, q_TV: Tensor, r_sum_T1: Tensor, upstream_T: Tensor) -> Tensor:
        return r_TV.addcmul_(q_TV, r_sum_T1, value=-1).mul_(
            upstream_T.unsqueeze(-1) / self.temperatures.student
        )


def local_normalizers(student_TV: Tensor, teacher_TV: Tensor, temperatures: Temperatures) -> Tensor:
    """[T, 4] max and sum of exp of both models over this rank's shard."""
    packed_T4 = numbers_per_row(student_TV, 4)
    for rows in row_pieces(student_TV):
        numbers = []
        pair = student_TV[rows], teacher_TV[rows]
        for logits_TV, max_T, tau in zip(pair, _local_maxima(*pair), temperatures, strict=True):
            numbers += [max_T, exp_(shifted(logits_TV, max_T.unsqueeze(-1), tau)).sum(-1)]
        packed_T4[rows] = torch.stack(numbers, -1)
    return packed_T4


def merged_normalizers(packed_RT4: Tensor, temperatures: Temperatures) -> Tensor:
    """[T, 4] M_x, S_x, M_y, S_y of the whole vocabulary from ``local_normalizers`` of all ranks."""
    max_x_RT, sum_x_RT, max_y_RT, sum_y_RT = packed_RT4.unbind(-1)
    student = SoftmaxStats.merged(max_x_RT, sum_x_RT, temperatures.student)
    teacher = SoftmaxStats.merged(max_y_RT, sum_y_RT, temperatures.teacher)
    return torch.stack([*student, *teacher], -1)


def log_softmax_pair(
    student_TV: Tensor, teacher_TV: Tensor, norms_T4: Tensor, temperatures: Temperatures
) -> tuple[Tensor, Tensor]:
    """New tensors (log q, log p) of this rank's shard."""
    max_x_T1, sum_x_T1, max_y_T1, sum_y_T1 = norms_T4.split(1, -1)
    log_q_TV = shifted(student_TV, max_x_T1, temperatures.student).sub_(sum_x_T1.log())
    log_p_TV = shifted(teacher_TV, max_y_T1, temperatures.teacher).sub_(sum_y_T1.log())
    return log_q_TV, log_p_TV


def _local_maxima(student_TV: Tensor, teacher_TV: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(student_TV.dtype)
    return local_max(student_TV).to(dtype), local_max(teacher_TV).to(dtype)


def _poison(sum_x: Tensor, sum_y: Tensor) -> Tensor:
    """0, but NaN in a row whose logits hold NaN or +inf, or nothing above -inf: ``times`` drops those entries."""
    return 0.0 * (sum_x.log() + sum_y.log())
