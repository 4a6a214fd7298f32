"""Divergences between two models' logits over a split vocabulary.

x and y are the student's and the teacher's logits divided by their temperatures, M and S the max and the sum of
exp(logit - max) over the whole vocabulary.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token, R = ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gkd.losses.comparison import Comparison, Rounds
from megatron_gkd.losses.divergences import Divergence, WeightedKL
from megatron_gkd.losses.elementwise import times
from megatron_gkd.losses.kernels import DenseKernels
from megatron_gkd.losses.kernels.eager import EAGER, poison
from megatron_gkd.losses.softmax import SoftmaxStats, Temperatures, accumulation_dtype


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
    kernels: DenseKernels = EAGER

    def rounds(self, student_TV: Tensor, teacher_TV: Tensor) -> Rounds:
        """See ``Comparison``; stats = M_x, S_x, M_y, S_y, KL(q || p) (0 where it is not used)."""
        return self._combine(
            (yield self.kernels.kl_sums(student_TV, teacher_TV, self.divergence, self.temperatures))
        )

    def num_stats(self, teacher_TV: Tensor) -> int:
        """Four normalizers and the KL."""
        return 5

    def write_gradient(
        self, student_TV: Tensor, teacher_TV: Tensor, stats_TK: Tensor, upstream_T: Tensor, out_TV: Tensor
    ) -> None:
        """(forward (q - p) + reverse q (log q - log p - KL(q || p))) / temperature."""
        self.kernels.write_kl_gradient(
            student_TV, teacher_TV, stats_TK, upstream_T, self.divergence, self.temperatures, out_TV
        )

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
    kernels: DenseKernels = EAGER

    def rounds(self, student_TV: Tensor, teacher_TV: Tensor) -> Rounds:
        """See ``Comparison``; stats = M_x, S_x, M_y, S_y, E = sum_v r_v."""
        return self._rounds(student_TV, teacher_TV, self.kernels.term_sums)

    def num_stats(self, teacher_TV: Tensor) -> int:
        """Four normalizers and E."""
        return 5

    def write_gradient(
        self, student_TV: Tensor, teacher_TV: Tensor, stats_TK: Tensor, upstream_T: Tensor, out_TV: Tensor
    ) -> None:
        """(r - q E) / temperature."""
        self.kernels.write_gradient(
            student_TV, teacher_TV, stats_TK, upstream_T, self.divergence, self.temperatures, out_TV
        )

    def differentiate_rounds_(self, student_TV: Tensor, teacher_TV: Tensor, upstream_T: Tensor) -> Rounds:
        """See ``Comparison``; what the second round computes may wait for its result in the storage of the logits.

        Not in storage of half precision, which would round it: there the gradient's pass computes it again.
        """
        if any(z_TV.dtype != accumulation_dtype(student_TV.dtype) for z_TV in (student_TV, teacher_TV)):
            return (yield from super().differentiate_rounds_(student_TV, teacher_TV, upstream_T))
        loss_T, stats_TK = yield from self._rounds(student_TV, teacher_TV, self.kernels.term_sums_)
        self.kernels.write_gradient_(
            student_TV, teacher_TV, stats_TK, upstream_T, self.divergence, self.temperatures
        )
        return loss_T, stats_TK

    def _rounds(self, student_TV: Tensor, teacher_TV: Tensor, term_sums: Callable[..., Tensor]) -> Rounds:
        packed_RTK = yield self.kernels.normalizers(student_TV, teacher_TV, self.temperatures)
        norms_TK = merged_normalizers(packed_RTK, self.temperatures)
        sums_T2 = term_sums(student_TV, teacher_TV, norms_TK, self.divergence, self.temperatures)
        # gathered and added in the order of ranks, so that all of them hold the same bits
        loss_T, r_sum_T = (yield sums_T2).sum(0).unbind(-1)
        poison_T = poison(norms_TK[:, 1], norms_TK[:, 3])
        return loss_T + poison_T, torch.cat([norms_TK, (r_sum_T + poison_T).unsqueeze(-1)], -1)


def merged_normalizers(packed_RT4: Tensor, temperatures: Temperatures) -> Tensor:
    """[T, 4] M_x, S_x, M_y, S_y of the whole vocabulary from ``DenseKernels.normalizers`` of all ranks."""
    max_x_RT, sum_x_RT, max_y_RT, sum_y_RT = packed_RT4.unbind(-1)
    student = SoftmaxStats.merged(max_x_RT, sum_x_RT, temperatures.student)
    teacher = SoftmaxStats.merged(max_y_RT, sum_y_RT, temperatures.teacher)
    return torch.stack([*student, *teacher], -1)
