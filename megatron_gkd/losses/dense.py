"""Divergences between two models' logits over a split vocabulary.

x and y are the student's and the teacher's logits divided by their temperatures, M and S the max and the sum of
exp(logit - max) over the whole vocabulary.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token, R = ranks, N = bins.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from megatron_gkd.losses.divergences import FAR, AdaptiveKL, Divergence, WeightedKL
from megatron_gkd.losses.kernels import make_kernels
from megatron_gkd.losses.kernels.eager import log_softmax_pair
from megatron_gkd.losses.kernels.interface import DenseKernels
from megatron_gkd.losses.token_loss import TokenLoss
from megatron_gkd.losses.vocab_parallel import (
    SoftmaxStats,
    Temperatures,
    accumulation_dtype,
    exp,
    nan_if_not_positive,
    numbers_per_row,
    row_pieces,
    times_,
)
from megatron_gkd.parallel.gathering import Group, Rounds, side_by_side

_LOWEST_LOG_P = -20.0
"""A head of mass m has its threshold at p >= (1 - m) / vocabulary: all entries below that hold less than 1 - m."""
_HIGHEST_LOG_P = 1e-3
"""Above 0, because rounding may be."""
_MAX_SUM_OF_PEAKED = 16.0
"""No row is far whose most probable entry has less mass than 1/16: few entries with all mass make r - q E cancel."""
_NUM_BINS = 64
_NUM_HISTOGRAMS = 3


def make_dense_loss(
    divergence: Divergence | AdaptiveKL,
    temperatures: Temperatures,
    group: Group,
    backend: str = "auto",
    rows_per_pass: int | None = None,
) -> TokenLoss:
    """The loss with the fewest collectives; its target is the teacher's logits [T, V].

    Args:
        divergence: What is computed.
        temperatures: Divisors of the logits.
        group: Tensor-parallel group, or ``None``.
        backend: A name in ``kernels.BACKENDS``; adaptive KL always runs in ``eager``.
        rows_per_pass: Rows of one elementwise pass; ``None``: chosen from the shapes.
    """
    if isinstance(divergence, AdaptiveKL):
        forward, reverse = (
            KLLoss(group, make_kernels("eager", WeightedKL(*weights), temperatures))
            for weights in ((1.0, 0.0), (0.0, 1.0))
        )
        return AdaptiveLoss(group, divergence.head_mass, forward, reverse)
    kernels = make_kernels(backend, divergence, temperatures, rows_per_pass)
    return (KLLoss if isinstance(divergence, WeightedKL) else SeparableLoss)(group, kernels)


@dataclass(frozen=True)
class _KernelLoss(TokenLoss):
    """A loss whose passes over the logits are ``kernels``; saved = their stats [T, K]."""

    kernels: DenseKernels

    @override
    def write_gradient(
        self, student_TV: Tensor, teacher_TV: Tensor, stats_TK: Tensor, upstream_T: Tensor, out_TV: Tensor
    ) -> None:
        self.kernels.gradient(student_TV, teacher_TV, stats_TK, upstream_T, out_TV)


@dataclass(frozen=True)
class KLLoss(_KernelLoss):
    """A weighted sum of forward and reverse KL, with one all-gather of five numbers per token (six if both occur).

    saved = M_x, S_x, M_y, S_y, and log(S_y / S_x) - KL(q || p) for a reverse direction.
    """

    @override
    def rounds(self, student_TV: Tensor, teacher_TV: Tensor) -> Rounds:
        kl, temperatures = self.kernels.divergence, self.kernels.temperatures
        assert isinstance(kl, WeightedKL)
        # in float64: few numbers, and differences of large ones
        first_RTK = (yield self.kernels.first(student_TV, teacher_TV)).double()
        max_x_RT, sum_x_RT, max_y_RT, sum_y_RT, *of_shards = first_RTK.unbind(-1)
        student = SoftmaxStats.merged(max_x_RT, sum_x_RT, temperatures.student)
        teacher = SoftmaxStats.merged(max_y_RT, sum_y_RT, temperatures.teacher)
        log_q_RT = sum_x_RT.log() + (max_x_RT - student.max_T) / temperatures.student - student.sumexp_T.log()
        log_p_RT = sum_y_RT.log() + (max_y_RT - teacher.max_T) / temperatures.teacher - teacher.sumexp_T.log()
        loss_T = shift_T = nan_if_not_positive(student.sumexp_T, teacher.sumexp_T)
        if kl.forward:
            loss_T = loss_T + kl.forward * _merged_kl(of_shards[0], log_p_RT, log_q_RT)
        if kl.reverse:
            reverse_kl_T = _merged_kl(of_shards[-1], log_q_RT, log_p_RT)
            loss_T = loss_T + kl.reverse * reverse_kl_T
            shift_T = teacher.sumexp_T.log() - student.sumexp_T.log() - reverse_kl_T
        dtype = accumulation_dtype(student_TV.dtype)
        return loss_T.to(dtype), torch.stack([*student, *teacher, shift_T], -1).to(dtype)


def _merged_kl(kl_RT: Tensor, log_a_RT: Tensor, log_b_RT: Tensor) -> Tensor:
    """[T] KL(a || b) = sum_r a_r (KL_r + log(a_r / b_r)): the chain rule, with the masses and the KL of each shard."""
    log_ratio_RT = torch.where(log_b_RT == -torch.inf, torch.inf, kl_RT + log_a_RT - log_b_RT)
    return times_(log_ratio_RT, log_a_RT.exp()).sum(0).clamp(min=0)


@dataclass(frozen=True)
class SeparableLoss(_KernelLoss):
    """Any divergence, with two dependent all-gathers: five numbers per token (the normalizers), then two sums.

    Two are the floor for a mixture of p and q, whose logarithm needs both normalizers first.
    saved = M_x, S_x, M_y, S_y, ``top_ratio`` of ``losses.divergences``, E = sum_v r_v.
    """

    @override
    def rounds(self, student_TV: Tensor, teacher_TV: Tensor) -> Rounds:
        return self._rounds(student_TV, teacher_TV, overwrite=False)

    @override
    def differentiate_rounds_(self, student_TV: Tensor, teacher_TV: Tensor, upstream_T: Tensor) -> Rounds:
        # what the second round computed waits in the storage of the logits, unless half precision would round it
        exact = accumulation_dtype(student_TV.dtype)
        overwrite = student_TV.dtype == teacher_TV.dtype == exact
        loss_T, stats_TK = yield from self._rounds(student_TV, teacher_TV, overwrite=overwrite)
        out_TV = None if overwrite else student_TV
        self.kernels.gradient(student_TV, teacher_TV, stats_TK, upstream_T, out_TV)
        return loss_T, stats_TK

    def _rounds(self, student_TV: Tensor, teacher_TV: Tensor, *, overwrite: bool) -> Rounds:
        norms_T5 = self._merged((yield self.kernels.first(student_TV, teacher_TV)))
        sums_T2 = self.kernels.second(student_TV, teacher_TV, norms_T5, overwrite=overwrite)
        # gathered and added in the order of ranks, so that all of them hold the same bits
        loss_T, r_sum_T = (yield sums_T2).sum(0).unbind(-1)
        poison_T = nan_if_not_positive(norms_T5[:, 1], norms_T5[:, 3])
        loss_T = loss_T + self.kernels.divergence.far_value * (norms_T5[:, 4] < FAR).to(loss_T.dtype)
        return loss_T + poison_T, torch.cat([norms_T5, (r_sum_T + poison_T).unsqueeze(-1)], -1)

    def _merged(self, packed_RT5: Tensor) -> Tensor:
        """[T, 5] ``norms_T5`` of ``DenseKernels.second`` from ``DenseKernels.first`` of all ranks."""
        tau = self.kernels.temperatures.teacher
        norms_T4 = merged_normalizers(packed_RT5[..., :4], self.kernels.temperatures)
        max_x_T, sum_x_T, max_y_T, sum_y_T = norms_T4.unbind(-1)
        # of the ranks whose max is the global one; several entries may share it: the largest of their teacher logits
        teacher_logit_T = packed_RT5[..., 4].where(packed_RT5[..., 0] == max_x_T, -torch.inf).amax(0)
        top_ratio_T = ((teacher_logit_T - max_y_T) / tau).exp() * sum_x_T / sum_y_T  # q is 1 / S_x there
        top_ratio_T = torch.where(sum_x_T < _MAX_SUM_OF_PEAKED, top_ratio_T, top_ratio_T.clamp(min=FAR))
        return torch.cat([norms_T4, top_ratio_T.unsqueeze(-1)], -1)


def merged_normalizers(packed_RT4: Tensor, temperatures: Temperatures) -> Tensor:
    """[T, 4] M_x, S_x, M_y, S_y of the whole vocabulary from m_x, s_x, m_y, s_y of all ranks."""
    max_x_RT, sum_x_RT, max_y_RT, sum_y_RT = packed_RT4.unbind(-1)
    student = SoftmaxStats.merged(max_x_RT, sum_x_RT, temperatures.student)
    teacher = SoftmaxStats.merged(max_y_RT, sum_y_RT, temperatures.teacher)
    return torch.stack([*student, *teacher], -1)


@dataclass(frozen=True)
class AdaptiveLoss(TokenLoss):
    """``divergences.AdaptiveKL`` with five all-gathers.

    One for both directions of KL, three for histograms of the teacher's mass over log p, each of which refines one bin
    of the last (no logits are gathered or sorted), and one for |p - q| over head and tail. The threshold of the head is
    found to 20 / 64^3 = 8e-5 nats: entries closer to it than that count as equal.

    saved = (stats of the forward direction, of the reverse one, weight of the forward one).
    """

    head_mass: float
    forward: KLLoss
    reverse: KLLoss
    metric_names = ("forward_weight",)

    @override
    def rounds(self, student_TV: Tensor, teacher_TV: Tensor) -> Rounds:
        directions = self.forward, self.reverse
        results = yield from side_by_side([kl.rounds(student_TV, teacher_TV) for kl in directions])
        (forward_T, forward_TK), (reverse_T, reverse_TK) = results
        norms_T4 = forward_TK[:, :4]
        threshold_T = yield from self._threshold(student_TV, teacher_TV, norms_T4)
        gaps_T2 = (yield self._local_gaps(student_TV, teacher_TV, norms_T4, threshold_T)).sum(0)
        total_T = gaps_T2.sum(-1)
        weight_T = torch.where(total_T == 0, 0.5, gaps_T2[:, 0] / total_T)
        return weight_T * forward_T + (1 - weight_T) * reverse_T, (forward_TK, reverse_TK, weight_T)

    @override
    def gradient(self, student_TV: Tensor, teacher_TV: Tensor, saved: Any, upstream_T: Tensor) -> Tensor:
        forward_TK, reverse_TK, weight_T = saved
        weighted_T = weight_T * upstream_T
        grad_TV = self.forward.gradient(student_TV, teacher_TV, forward_TK, weighted_T)
        return grad_TV.add_(
            self.reverse.gradient(student_TV, teacher_TV, reverse_TK, upstream_T - weighted_T)
        )

    @override
    def metrics(self, saved: Any) -> tuple[Tensor, ...]:
        return (saved[2],)

    def _threshold(
        self, student_TV: Tensor, teacher_TV: Tensor, norms_T4: Tensor
    ) -> Generator[Tensor, Tensor, Tensor]:
        """[T] the largest log p above which the teacher has at least ``head_mass``."""
        low_T = norms_T4.new_full(norms_T4.shape[:1], _LOWEST_LOG_P)
        above_T, bin_width = torch.zeros_like(low_T), (_HIGHEST_LOG_P - _LOWEST_LOG_P) / _NUM_BINS
        for _ in range(_NUM_HISTOGRAMS):
            local_TN = numbers_per_row(student_TV, _NUM_BINS)
            for rows in row_pieces(student_TV):
                _, log_p_TV = self._log_softmax_pair(student_TV, teacher_TV, norms_T4, rows)
                local_TN[rows] = _histogram(log_p_TV, low_T[rows], bin_width)
            mass_TN = (yield local_TN).sum(0)
            from_bin_TN = above_T.unsqueeze(-1) + mass_TN.flip(-1).cumsum(-1).flip(-1)
            chosen_T1 = (from_bin_TN >= self.head_mass).sum(-1, keepdim=True).sub_(1).clamp_(min=0)
            above_T = (from_bin_TN - mass_TN).gather(-1, chosen_T1).squeeze(-1)
            low_T = low_T + chosen_T1.squeeze(-1) * bin_width
            bin_width /= _NUM_BINS
        return low_T

    def _local_gaps(
        self, student_TV: Tensor, teacher_TV: Tensor, norms_T4: Tensor, threshold_T: Tensor
    ) -> Tensor:
        """[T, 2] sums of |p - q| over the head and the tail."""
        gaps_T2 = numbers_per_row(student_TV, 2)
        for rows in row_pieces(student_TV):
            log_q_TV, log_p_TV = self._log_softmax_pair(student_TV, teacher_TV, norms_T4, rows)
            gap_TV = (exp(log_p_TV) - exp(log_q_TV)).abs_()
            is_head_TV = log_p_TV >= threshold_T[rows].unsqueeze(-1)
            gaps_T2[rows, 0] = (gap_TV * is_head_TV).sum(-1)
            gaps_T2[rows, 1] = (gap_TV * ~is_head_TV).sum(-1)
        return gaps_T2

    def _log_softmax_pair(
        self, student_TV: Tensor, teacher_TV: Tensor, norms_T4: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor]:
        temperatures = self.forward.kernels.temperatures
        return log_softmax_pair(student_TV[rows], teacher_TV[rows], norms_T4[rows], temperatures)


def _histogram(log_p_TV: Tensor, low_T: Tensor, bin_width: float) -> Tensor:
    """[T, N] mass of p by log p in N bins from ``low_T`` on; entries outside are left out."""
    bin_TV = ((log_p_TV - low_T.unsqueeze(-1)) / bin_width).floor_().nan_to_num_(nan=-1.0)
    bin_TV = bin_TV.clamp_(-1, _NUM_BINS).add_(1).long()
    mass_TN = log_p_TV.new_zeros(len(low_T), _NUM_BINS + 2)  # the first and the last bin: outside
    return mass_TN.scatter_add_(-1, bin_TV, exp(log_p_TV))[:, 1:-1]
