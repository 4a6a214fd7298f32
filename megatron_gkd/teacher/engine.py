"""What the training loop asks of a teacher."""

from collections.abc import Sequence
from typing import Protocol

from megatron_gkd.data.sample import Batch, MicroBatch
from megatron_gkd.teacher.signal import Signal


class TeacherEngine(Protocol):
    """Scores a batch without gradient."""

    def score(self, batch: Batch, micro_batches: list[MicroBatch]) -> Sequence[Signal]:
        """The teacher's signal for each of this rank's student micro-batches; collective over all ranks.

        Returns:
            One signal per micro-batch on the ranks of the student's last stage, nothing elsewhere.
        """
        ...


class NoTeacher:
    """For training by cross-entropy: there is nothing to score."""

    def score(self, batch: Batch, micro_batches: list[MicroBatch]) -> Sequence[Signal]:
        """See ``TeacherEngine.score``."""
        return []
