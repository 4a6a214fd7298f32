"""What the training loop asks of a teacher."""

from typing import Protocol

from megatron_gkd.data.sample import Batch, MicroBatch
from megatron_gkd.teacher.signal import HiddenSignal


class TeacherEngine(Protocol):
    """Scores a batch without gradient."""

    def score(self, batch: Batch, micro_batches: list[MicroBatch]) -> list[HiddenSignal]:
        """The teacher's signal for each of this rank's student micro-batches; collective over all ranks.

        Returns:
            One signal per micro-batch on the ranks of the student's last stage, nothing elsewhere.
        """
        ...
