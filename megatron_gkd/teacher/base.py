"""The interface of a teacher, the signals that it hands to the loss, and what a teacher is built from.

Shapes: T = rows that enter the loss, H = the teacher's hidden size, K = entries of a row, V = vocabulary entries of a
student rank.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor
from typing_extensions import override

from megatron_gkd.config import GkdConfig
from megatron_gkd.config.teacher import NoTeacherConfig
from megatron_gkd.data.sample import Batch, MicroBatch
from megatron_gkd.data.tokenizer import Tokenizer
from megatron_gkd.models.gpt import ShardedModel
from megatron_gkd.parallel.groups import Job

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HiddenSignal:
    """The teacher's full distribution, as its last hidden state after the final norm; exact for any divergence.

    Attributes:
        rows_TH: [T, H] one row per loss token, in the order of ``models.gpt.select_rows``.
    """

    rows_TH: Tensor


@dataclass(frozen=True)
class TopKSignal:
    """The teacher's most probable entries of each row.

    Attributes:
        ids_TK: [T, K] int64 token ids, distinct within a row; -1 marks an unused place, so that rows may have different
            numbers of entries. Rows as those of ``HiddenSignal``.
        log_probs_TK: [T, K] log-probabilities over the full vocabulary, float32; undefined where the id is -1.
        token_log_prob_T: [T] log-probability of the next token of the sequence; ``None`` if it was not requested.
    """

    ids_TK: Tensor
    log_probs_TK: Tensor
    token_log_prob_T: Tensor | None = None


Signal = HiddenSignal | TopKSignal


@dataclass(frozen=True)
class TeacherContext:
    """What a teacher is checked against and built from, besides its own section.

    Attributes:
        config: The whole configuration.
        job: This process.
        tokenizer: The student's.
    """

    config: GkdConfig
    job: Job
    tokenizer: Tokenizer


class TeacherEngine(Protocol):
    """Scores batches without gradient.

    Attributes:
        head_VH: [V, H] this rank's shard of the output projection that turns a ``HiddenSignal`` into logits, split as the
            student's vocabulary; ``None`` off the student's last stage, and for other signals.
    """

    head_VH: Tensor | None = None

    @classmethod
    def preflight(cls, section: Any, context: TeacherContext) -> None:
        """Check that the teacher can work on this machine; runs before the process group exists.

        Args:
            section: The teacher section of this kind.
            context: The rest of the run.

        Raises:
            ConfigError: Names the key, and what is wrong with its value.
            DataError: The teacher has another vocabulary than the student.
        """

    @classmethod
    def build(cls, section: Any, context: TeacherContext, student: ShardedModel) -> Self:
        """The teacher of a section. Collective.

        Args:
            section: The teacher section of this kind.
            context: The rest of the run.
            student: Needs the signals on its last stage.
        """
        ...

    def score(self, batch: Batch, micro_batches: list[MicroBatch]) -> Sequence[Signal]:
        """The signal of each of this rank's student micro-batches; collective over all ranks.

        Returns:
            One signal per micro-batch on the ranks of the student's last stage, nothing elsewhere.

        Raises:
            EngineError: On all ranks alike.
        """
        ...


class NoTeacher(TeacherEngine):
    """For training by cross-entropy alone: no signals."""

    @override
    @classmethod
    def build(cls, section: NoTeacherConfig, context: TeacherContext, student: ShardedModel) -> "NoTeacher":
        if context.config.gkd.lmbda > 0:
            log.warning(
                "gkd.lmbda=%g: the cross-entropy also pulls the student towards what it writes itself; set gkd.lmbda=0 to "
                "learn from the data alone",
                context.config.gkd.lmbda,
            )
        return cls()

    @override
    def score(self, batch: Batch, micro_batches: list[MicroBatch]) -> Sequence[Signal]:
        return []
