"""What a back end computes for a comparison with a teacher's logits.

x and y are the student's and the teacher's logits divided by their temperatures; M and S the max and the sum of
exp((logit - M) / temperature) over the whole vocabulary, of logits that are not divided.

Shapes: T = tokens, V = real vocabulary entries held by this rank (maybe 0), K = numbers per token.
"""

from typing import Protocol

from torch import Tensor

from megatron_gkd.losses.divergences import Divergence, WeightedKL
from megatron_gkd.losses.softmax import Temperatures


class DenseKernels(Protocol):
    """Passes over [T, V]. All arithmetic and all returned numbers are float32 (float64 for float64 logits).

    Where ``out_TV`` is given it may be the storage of ``student_TV``, and its dtype any float type. No row touches
    another: a NaN stays in its own.
    """

    def kl_sums(
        self, student_TV: Tensor, teacher_TV: Tensor, kl: WeightedKL, temperatures: Temperatures, /
    ) -> Tensor:
        """[T, 4 + directions] of this rank's shard: max and sum of exp of x, the same of y, and the cross sums.

        The cross sum of the forward direction is sum_v e^(y - m_y) [(y - m_y) - (x - m_x)], that of the reverse one the
        same with x and y exchanged; each is there if its weight is not 0, forward first.
        """
        ...

    def write_kl_gradient(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        stats_T5: Tensor,
        upstream_T: Tensor,
        kl: WeightedKL,
        temperatures: Temperatures,
        out_TV: Tensor,
        /,
    ) -> None:
        """Write upstream (forward (q - p) + reverse q (log q - log p - KL(q || p))) / temperature.

        ``stats_T5`` is M_x, S_x, M_y, S_y, KL(q || p). Exactly 0 where p = q.
        """
        ...

    def normalizers(self, student_TV: Tensor, teacher_TV: Tensor, temperatures: Temperatures, /) -> Tensor:
        """[T, 4] max and sum of exp of x, the same of y, over this rank's shard."""
        ...

    def term_sums(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        norms_T4: Tensor,
        divergence: Divergence,
        temperatures: Temperatures,
        /,
    ) -> Tensor:
        """[T, 2] sums over this rank's shard of the divergence's values and of its r; ``norms_T4`` is M_x, S_x, M_y, S_y."""
        ...

    def write_gradient(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        stats_T5: Tensor,
        upstream_T: Tensor,
        divergence: Divergence,
        temperatures: Temperatures,
        out_TV: Tensor,
        /,
    ) -> None:
        """Write upstream (r - q E) / temperature; ``stats_T5`` is M_x, S_x, M_y, S_y, E."""
        ...

    def term_sums_(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        norms_T4: Tensor,
        divergence: Divergence,
        temperatures: Temperatures,
        /,
    ) -> Tensor:
        """As ``term_sums``; may leave in both storages what ``write_gradient_`` needs."""
        ...

    def write_gradient_(
        self,
        student_TV: Tensor,
        teacher_TV: Tensor,
        stats_T5: Tensor,
        upstream_T: Tensor,
        divergence: Divergence,
        temperatures: Temperatures,
        /,
    ) -> None:
        """As ``write_gradient`` into ``student_TV``, after ``term_sums_``."""
        ...
