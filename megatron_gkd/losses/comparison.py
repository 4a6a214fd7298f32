"""Compare two rows of logits over a split vocabulary: value, and gradient with respect to the student's.

Nothing here knows where the logits come from: ``distill`` passes slices of given logits, ``linear`` passes chunks that
it makes from hidden states. A comparison has three entries, which a faster back end can replace one by one:

    measure         logits -> loss, and the few numbers per token that the gradient needs; holds every collective
    gradient        logits and those numbers -> d loss / d logits; local, so that a backward pass never communicates
    differentiate_  both at once, the gradient into the student's storage; saves work between them

x and y are the student's and the teacher's logits divided by the temperature, M and S the max and the sum of
exp(logit - max) over the whole vocabulary. All arithmetic is in float32 (float64 for float64 student logits).

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token, R = ranks.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_gkd.losses.divergences import Divergence, WeightedKL
from megatron_gkd.losses.elementwise import exp_, times
from megatron_gkd.losses.softmax import (
    Group,
    SoftmaxStats,
    accumulation_dtype,
    gather_rows,
    local_max,
    numbers_per_row,
    row_blocks,
    row_pieces,
    shifted,
)


class Comparison(Protocol):
    """How a student's logits [T, V] are compared with a target: a teacher's logits [T, V], or labels [T]."""

    @property
    def group(self) -> Group:
        """Ranks that the vocabulary is split over, or ``None``."""
        ...

    def measure(self, student_TV: Tensor, target: Tensor, /) -> tuple[Tensor, Tensor]:
        """(loss_T in nats, stats_TK for ``gradient``), equal on all ranks; the logits are not modified."""
        ...

    def gradient(self, student_TV: Tensor, target: Tensor, stats_TK: Tensor, upstream_T: Tensor, /) -> Tensor:
        """[T, V] upstream * d loss / d logits of the student; allocates a few [T, V], so pass pieces of rows."""
        ...

    def differentiate_(self, student_TV: Tensor, target: Tensor, upstream_T: Tensor, /) -> Tensor:
        """loss_T; ``student_TV`` is overwritten with its gradient, a teacher's with scratch: both float32 or 64."""
        ...


def make_comparison(divergence: Divergence, temperature: float, group: Group) -> Comparison:
    """The comparison with the fewest collectives: one per block for a weighted KL, two for any other divergence.

    Raises:
        ValueError: If ``temperature`` is not positive.
    """
    if not temperature > 0:
        raise ValueError(
            f"the loss needs a temperature above 0, got {temperature}; 1.0 leaves the logits as they are"
        )
    if isinstance(divergence, WeightedKL):
        return OneRound(divergence, temperature, group)
    return TwoRounds(divergence, temperature, group)


@dataclass(frozen=True)
class OneRound:
    """A weighted sum of forward and reverse KL, with one all-gather of five numbers per token (six if both occur).

    Each rank contributes m and s, its own max and sum of exp, of both models, and of the forward direction
    A = sum_v e^(y - m_y) [(y - m_y) - (x - m_x)]. With A* = sum over ranks of
    (A + s_y [(m_y - M_y) - (m_x - M_x)]) e^(m_y - M_y):  KL(p || q) = A* / S_y - log S_y + log S_x.
    The reverse direction exchanges x and y.
    """

    divergence: WeightedKL
    temperature: float
    group: Group

    def measure(self, student_TV: Tensor, teacher_TV: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Comparison``; stats = M_x, S_x, M_y, S_y, KL(q || p) (0 where it is not used)."""
        num_directions = (self.divergence.forward != 0) + (self.divergence.reverse != 0)
        packed_TK = numbers_per_row(student_TV, 4 + num_directions)
        for rows in row_pieces(student_TV):
            packed_TK[rows] = self._local_sums(student_TV[rows], teacher_TV[rows])
        return self._combine(gather_rows(packed_TK, self.group))

    def gradient(
        self, student_TV: Tensor, teacher_TV: Tensor, stats_TK: Tensor, upstream_T: Tensor
    ) -> Tensor:
        """(forward (q - p) + reverse q (log q - log p - KL(q || p))) / temperature."""
        max_x_T1, sum_x_T1, max_y_T1, sum_y_T1, reverse_kl_T1 = stats_TK.split(1, -1)
        upstream_T1 = upstream_T.unsqueeze(-1) / self.temperature
        x_TV = shifted(student_TV, max_x_T1, self.temperature)
        y_TV = shifted(teacher_TV, max_y_T1, self.temperature)
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

    def differentiate_(self, student_TV: Tensor, teacher_TV: Tensor, upstream_T: Tensor) -> Tensor:
        """See ``Comparison``."""
        return measure_then_gradient_(self, student_TV, teacher_TV, upstream_T)

    def _local_sums(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        max_x_T, max_y_T = _local_maxima(student_TV, teacher_TV)
        x_TV = shifted(student_TV, max_x_T.unsqueeze(-1), self.temperature)
        y_TV = shifted(teacher_TV, max_y_T.unsqueeze(-1), self.temperature)
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
        student = SoftmaxStats.merged(max_x_RT, sum_x_RT, self.temperature)
        teacher = SoftmaxStats.merged(max_y_RT, sum_y_RT, self.temperature)
        far_x_RT = (max_x_RT - student.max_T) / self.temperature
        far_y_RT = (max_y_RT - teacher.max_T) / self.temperature
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
class TwoRounds:
    """Any divergence, with two dependent all-gathers: four numbers per token (the normalizers), then two sums.

    Two are the floor for a mixture of p and q, whose logarithm needs both normalizers first.
    """

    divergence: Divergence
    temperature: float
    group: Group

    def measure(self, student_TV: Tensor, teacher_TV: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Comparison``; stats = M_x, S_x, M_y, S_y, E = sum_v r_v."""
        norms_TK = self._normalizers(student_TV, teacher_TV)
        sums_T2 = numbers_per_row(student_TV, 2)
        for rows in row_pieces(student_TV):
            sums_T2[rows] = self._terms(student_TV[rows], teacher_TV[rows], norms_TK[rows])[0]
        return self._combine(norms_TK, sums_T2)

    def gradient(
        self, student_TV: Tensor, teacher_TV: Tensor, stats_TK: Tensor, upstream_T: Tensor
    ) -> Tensor:
        """(r - q E) / temperature."""
        norms_TK, r_sum_T1 = stats_TK.split([4, 1], -1)
        _, r_TV, q_TV = self._terms(student_TV, teacher_TV, norms_TK)
        return self._assemble(r_TV, q_TV, r_sum_T1, upstream_T)

    def differentiate_(self, student_TV: Tensor, teacher_TV: Tensor, upstream_T: Tensor) -> Tensor:
        """See ``Comparison``; r and q wait for the second round in the storage of the two logits."""
        loss_T = upstream_T.new_empty(upstream_T.shape)
        for block in row_blocks(student_TV, self.group):
            x_TV, y_TV, block_upstream_T = student_TV[block], teacher_TV[block], upstream_T[block]
            norms_TK = self._normalizers(x_TV, y_TV)
            sums_T2 = numbers_per_row(x_TV, 2)
            for rows in row_pieces(x_TV):
                sums_T2[rows], x_TV[rows], y_TV[rows] = self._terms(x_TV[rows], y_TV[rows], norms_TK[rows])
            loss_T[block], stats_TK = self._combine(norms_TK, sums_T2)
            for rows in row_pieces(x_TV):
                self._assemble(x_TV[rows], y_TV[rows], stats_TK[rows, 4:], block_upstream_T[rows])
        return loss_T

    def _normalizers(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        packed_TK = numbers_per_row(student_TV, 4)
        for rows in row_pieces(student_TV):
            packed_TK[rows] = self._local_sums(student_TV[rows], teacher_TV[rows])
        max_x_RT, sum_x_RT, max_y_RT, sum_y_RT = gather_rows(packed_TK, self.group).unbind(-1)
        student = SoftmaxStats.merged(max_x_RT, sum_x_RT, self.temperature)
        teacher = SoftmaxStats.merged(max_y_RT, sum_y_RT, self.temperature)
        return torch.stack([*student, *teacher], -1)

    def _local_sums(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        numbers = []
        maxima = _local_maxima(student_TV, teacher_TV)
        for logits_TV, max_T in zip((student_TV, teacher_TV), maxima, strict=True):
            numbers += [max_T, exp_(shifted(logits_TV, max_T.unsqueeze(-1), self.temperature)).sum(-1)]
        return torch.stack(numbers, -1)

    def _terms(
        self, student_TV: Tensor, teacher_TV: Tensor, norms_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(local sums of value and r [T, 2], r [T, V], q [T, V])."""
        max_x_T1, sum_x_T1, max_y_T1, sum_y_T1 = norms_TK.split(1, -1)
        log_q_TV = shifted(student_TV, max_x_T1, self.temperature).sub_(sum_x_T1.log())
        log_p_TV = shifted(teacher_TV, max_y_T1, self.temperature).sub_(sum_y_T1.log())
        value_TV, r_TV = self.divergence(log_p_TV, log_q_TV)
        return torch.stack([value_TV.sum(-1), r_TV.sum(-1)], -1), r_TV, exp_(log_q_TV)

    def _combine(self, norms_TK: Tensor, sums_T2: Tensor) -> tuple[Tensor, Tensor]:
        # gathered and added in the order of ranks, so that all of them hold the same bits
        loss_T, r_sum_T = gather_rows(sums_T2, self.group).sum(0).unbind(-1)
        poison_T = _poison(norms_TK[:, 1], norms_TK[:, 3])
        return loss_T + poison_T, torch.cat([norms_TK, (r_sum_T + poison_T).unsqueeze(-1)], -1)

    def _assemble(self, r_TV: Tensor, q_TV: Tensor, r_sum_T1: Tensor, upstream_T: Tensor) -> Tensor:
        return r_TV.addcmul_(q_TV, r_sum_T1, value=-1).mul_(upstream_T.unsqueeze(-1) / self.temperature)


def measure_then_gradient_(
    comparison: Comparison, student_TV: Tensor, target: Tensor, upstream_T: Tensor
) -> Tensor:
    """``Comparison.differentiate_`` of a comparison that has nothing to keep between its two passes."""
    loss_T = torch.empty_like(upstream_T)
    for block in row_blocks(student_TV, comparison.group):
        x_TV, block_target, block_upstream_T = student_TV[block], target[block], upstream_T[block]
        loss_T[block], stats_TK = comparison.measure(x_TV, block_target)
        for rows in row_pieces(x_TV):
            x_TV[rows] = comparison.gradient(
                x_TV[rows], block_target[rows], stats_TK[rows], block_upstream_T[rows]
            )
    return loss_T


def _local_maxima(student_TV: Tensor, teacher_TV: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(student_TV.dtype)
    return local_max(student_TV).to(dtype), local_max(teacher_TV).to(dtype)


def _poison(sum_x: Tensor, sum_y: Tensor) -> Tensor:
    """0, but NaN in a row whose logits hold NaN or +inf, or nothing above -inf: ``times`` drops those entries."""
    return 0.0 * (sum_x.log() + sum_y.log())
