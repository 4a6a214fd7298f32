"""Cross-entropy of labels over a split vocabulary, as a ``Comparison`` whose target is a label instead of a teacher.

Shapes: T = tokens, V = real vocabulary entries held by this rank, R = ranks.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gkd.losses.comparison import Comparison, Rounds
from megatron_gkd.losses.elementwise import exp_
from megatron_gkd.losses.softmax import (
    SoftmaxStats,
    local_max,
    numbers_per_row,
    row_pieces,
    shifted,
)


@dataclass(frozen=True)
class LabelComparison(Comparison):
    """-log q(label) with one all-gather of three numbers per token; the temperature is 1.

    ``labels_T`` counts from this rank's first column; a label that no rank owns has loss +inf.
    """

    def rounds(self, student_TV: Tensor, labels_T: Tensor) -> Rounds:
        """Loss = log S - (x_label - M); stats = M, S."""
        packed_T3 = numbers_per_row(student_TV, 3)
        for rows in row_pieces(student_TV):
            max_T = local_max(student_TV[rows]).to(packed_T3.dtype)
            sumexp_T = exp_(shifted(student_TV[rows], max_T.unsqueeze(-1))).sum(-1)
            packed_T3[rows, 0], packed_T3[rows, 1] = max_T, sumexp_T
        packed_T3[:, 2] = self._label_logits(student_TV, labels_T)
        max_RT, sumexp_RT, label_RT = (yield packed_T3).unbind(-1)
        stats = SoftmaxStats.merged(max_RT, sumexp_RT)
        return stats.sumexp_T.log() - (label_RT.amax(0) - stats.max_T), torch.stack(stats, -1)

    def num_stats(self, labels_T: Tensor) -> int:
        """The normalizer."""
        return 2

    def gradient(self, student_TV: Tensor, labels_T: Tensor, stats_TK: Tensor, upstream_T: Tensor) -> Tensor:
        """Upstream * (q - one_hot(label))."""
        max_T1, sumexp_T1 = stats_TK.split(1, -1)
        grad_TV = exp_(shifted(student_TV, max_T1)).mul_(upstream_T.unsqueeze(-1) / sumexp_T1)
        column_T, is_owned_T = self._columns(grad_TV, labels_T)
        if grad_TV.shape[-1] > 0:
            grad_TV.scatter_add_(
                -1, column_T.unsqueeze(-1), -torch.where(is_owned_T, upstream_T, 0.0).unsqueeze(-1)
            )
        return grad_TV

    def _label_logits(self, student_TV: Tensor, labels_T: Tensor) -> Tensor:
        """[T] logit of the label on its owner, -inf elsewhere."""
        if student_TV.shape[-1] == 0:
            return student_TV.new_full(labels_T.shape, -math.inf)
        column_T, is_owned_T = self._columns(student_TV, labels_T)
        logit_T = student_TV.gather(-1, column_T.unsqueeze(-1)).squeeze(-1)
        return torch.where(is_owned_T, logit_T, -math.inf)

    def _columns(self, student_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        """(column of each label, 0 where this rank does not own it; whether it does)."""
        is_owned_T = (labels_T >= 0) & (labels_T < student_TV.shape[-1])
        return torch.where(is_owned_T, labels_T, 0), is_owned_T
