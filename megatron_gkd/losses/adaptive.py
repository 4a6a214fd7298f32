"""Adaptive KL: forward and reverse KL with a weight that every token finds for itself.

Shapes: T = tokens, V = real vocabulary entries held by this rank, K = numbers per token, N = bins.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gkd.losses.comparison import Comparison, Rounds, side_by_side
from megatron_gkd.losses.dense import OneRound
from megatron_gkd.losses.divergences import WeightedKL
from megatron_gkd.losses.elementwise import exp
from megatron_gkd.losses.kernels.eager import log_softmax_pair
from megatron_gkd.losses.softmax import Temperatures, numbers_per_row, row_pieces

_LOWEST_LOG_P = -20.0
"""A head of mass m has its threshold at p >= (1 - m) / vocabulary: all entries below that hold less than 1 - m."""
_HIGHEST_LOG_P = 1e-3
"""Above 0, because rounding may be."""
_NUM_BINS = 64
_NUM_HISTOGRAMS = 3


@dataclass(frozen=True)
class Adaptive(Comparison):
    """``divergences.AdaptiveKL`` with five all-gathers.

    One for both directions of KL, three for histograms of the teacher's mass over log p, each of which refines one bin
    of the last (no logits are gathered or sorted), and one for |p - q| over head and tail. The threshold of the head is
    found to 20 / 64^3 = 8e-5 nats: entries closer to it than that count as equal.
    """

    head_mass: float
    temperatures: Temperatures

    def rounds(self, student_TV: Tensor, teacher_TV: Tensor) -> Rounds:
        """See ``Comparison``; stats = those of both directions, then the weight of the forward one."""
        forward, reverse = yield from side_by_side(
            [direction.rounds(student_TV, teacher_TV) for direction in self._directions]
        )
        (forward_T, forward_TK), (reverse_T, reverse_TK) = forward, reverse
        norms_T4 = forward_TK[:, :4]
        threshold_T = yield from self._threshold(student_TV, teacher_TV, norms_T4)
        gaps_T2 = (yield self._local_gaps(student_TV, teacher_TV, norms_T4, threshold_T)).sum(0)
        total_T = gaps_T2.sum(-1)
        weight_T = torch.where(total_T == 0, 0.5, gaps_T2[:, 0] / total_T)
        loss_T = weight_T * forward_T + (1 - weight_T) * reverse_T
        return loss_T, torch.cat([forward_TK, reverse_TK, weight_T.unsqueeze(-1)], -1)

    def num_stats(self, teacher_TV: Tensor) -> int:
        """See ``rounds``."""
        return 11

    def gradient(
        self, student_TV: Tensor, teacher_TV: Tensor, stats_TK: Tensor, upstream_T: Tensor
    ) -> Tensor:
        """Both directions' gradients; the weights have none."""
        forward_TK, reverse_TK, weight_T1 = stats_TK.split([5, 5, 1], -1)
        forward, reverse = self._directions
        weighted_T = weight_T1.squeeze(-1) * upstream_T
        grad_TV = forward.gradient(student_TV, teacher_TV, forward_TK, weighted_T)
        return grad_TV.add_(reverse.gradient(student_TV, teacher_TV, reverse_TK, upstream_T - weighted_T))

    @property
    def detail_names(self) -> tuple[str, ...]:
        """The weight that was found."""
        return ("forward_weight",)

    def details(self, stats_TK: Tensor, teacher_TV: Tensor) -> Tensor:
        """See ``detail_names``."""
        return stats_TK[:, -1:]

    @property
    def _directions(self) -> tuple[OneRound, OneRound]:
        forward, reverse = WeightedKL(1.0, 0.0), WeightedKL(0.0, 1.0)
        return OneRound(self.group, forward, self.temperatures), OneRound(
            self.group, reverse, self.temperatures
        )

    def _threshold(
        self, student_TV: Tensor, teacher_TV: Tensor, norms_T4: Tensor
    ) -> Generator[Tensor, Tensor, Tensor]:
        """[T] the largest log p above which the teacher has at least ``head_mass``."""
        low_T = norms_T4.new_full(norms_T4.shape[:1], _LOWEST_LOG_P)
        above_T, bin_width = torch.zeros_like(low_T), (_HIGHEST_LOG_P - _LOWEST_LOG_P) / _NUM_BINS
        for _ in range(_NUM_HISTOGRAMS):
            local_TN = numbers_per_row(student_TV, _NUM_BINS)
            for rows in row_pieces(student_TV):
                _, log_p_TV = log_softmax_pair(
                    student_TV[rows], teacher_TV[rows], norms_T4[rows], self.temperatures
                )
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
            log_q_TV, log_p_TV = log_softmax_pair(
                student_TV[rows], teacher_TV[rows], norms_T4[rows], self.temperatures
            )
            gap_TV = (exp(log_p_TV) - exp(log_q_TV)).abs_()
            is_head_TV = log_p_TV >= threshold_T[rows].unsqueeze(-1)
            gaps_T2[rows, 0] = (gap_TV * is_head_TV).sum(-1)
            gaps_T2[rows, 1] = (gap_TV * ~is_head_TV).sum(-1)
        return gaps_T2


def _histogram(log_p_TV: Tensor, low_T: Tensor, bin_width: float) -> Tensor:
    """[T, N] mass of p by log p in N bins from ``low_T`` on; entries outside are left out."""
    bin_TV = ((log_p_TV - low_T.unsqueeze(-1)) / bin_width).floor_().nan_to_num_(nan=-1.0)
    bin_TV = bin_TV.clamp_(-1, _NUM_BINS).add_(1).long()
    mass_TN = log_p_TV.new_zeros(len(low_T), _NUM_BINS + 2)  # the first and the last bin: outside
    return mass_TN.scatter_add_(-1, bin_TV, exp(log_p_TV))[:, 1:-1]
