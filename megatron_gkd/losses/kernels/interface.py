"""What a back end computes for the divergence from a teacher's logits.

x and y are the student's and the teacher's logits divided by their temperatures; m and s the max and the sum of
exp((logit - m) / temperature) over this rank's shard, M and S those over the whole vocabulary; the maxima are of logits
that are not divided.

Shapes: T = tokens, V = real vocabulary entries held by this rank (maybe 0), K = numbers per token.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from megatron_gkd.losses.divergences import Divergence, WeightedKL
from megatron_gkd.losses.vocab_parallel import Temperatures


@dataclass(frozen=True)
class DenseKernels(ABC):
    """Three passes over [T, V]; arithmetic and returned numbers are float32 (float64 for float64 logits).

    A weighted KL needs ``first`` and ``gradient``, any other divergence all three. No row touches another: a NaN stays in
    its own.

    Attributes:
        divergence: What is computed.
        temperatures: Divisors of the logits.
        rows_per_pass: Rows of one elementwise pass; ``None``: chosen from the shapes.
    """

    divergence: Divergence
    temperatures: Temperatures
    rows_per_pass: int | None = None

    @cached_property
    def num_first(self) -> int:
        """Numbers per token that ``first`` returns."""
        kl = self.divergence
        return 4 + (kl.forward != 0) + (kl.reverse != 0) if isinstance(kl, WeightedKL) else 5

    @abstractmethod
    def first(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        """[T, num_first] statistics of this rank's shard.

        m_x, s_x, m_y, s_y; then of a weighted KL the KL of the two softmaxes over the shard, for each direction with a
        weight, the forward one first, which keeps its digits for similar models; and of any other divergence the
        teacher's logit of the student's most probable entry.
        """

    @abstractmethod
    def second(
        self, student_TV: Tensor, teacher_TV: Tensor, norms_T5: Tensor, *, overwrite: bool = False
    ) -> Tensor:
        """[T, 2] sums over this rank's shard of the divergence's values, without ``far_value``, and of r.

        Args:
            student_TV: Student's logits.
            teacher_TV: Teacher's logits.
            norms_T5: M_x, S_x, M_y, S_y of the whole vocabulary, and ``top_ratio`` of ``losses.divergences``.
            overwrite: The logits' storage may be used to keep what ``gradient`` needs.
        """

    @abstractmethod
    def gradient(
        self, student_TV: Tensor, teacher_TV: Tensor, stats_TK: Tensor, grad_T: Tensor, out_TV: Tensor | None
    ) -> None:
        """Write grad * d divergence / d logits of the student.

        Of a weighted KL grad (forward (q - p) + reverse q (log q - log p - KL(q || p))) / temperature, exactly 0 where
        p = q; ``stats_TK`` is M_x, S_x, M_y, S_y, log(S_y / S_x) - KL(q || p). Of any other divergence
        grad (r - q E) / temperature; ``stats_TK`` is ``norms_T5`` and E = sum_v r_v.

        Args:
            student_TV: Student's logits.
            teacher_TV: Teacher's logits.
            stats_TK: Numbers of the whole vocabulary.
            grad_T: Upstream gradient of each row.
            out_TV: Any float dtype; may be the storage of ``student_TV``. ``None``: ``second`` ran with ``overwrite``, and the
                gradient takes the place of the student's logits.
        """
