"""Prompts, samples and batches: plain data without devices or process groups.

Shapes: B = sequences in a micro-batch, S = positions of a padded sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

FinishReason = Literal["stop", "length", "data"]


@dataclass(frozen=True)
class Prompt:
    """One encoded row of a prompt file.

    Attributes:
        row: 0-based row or line of the file (editors show row + 1).
        ids: Token ids of the prompt.
        completion_ids: The dataset's completion, ending with an end-of-sequence token; ``None`` if the row has none.
        text: The prompt after the chat template, for logs.
        file: Index of the file in data.prompts.
        loss_mask: True for prompt tokens of earlier assistant turns, which count in the loss if the completion comes
            from the dataset. Empty: none.
        teacher_ids: The teacher's prompt in place of ``ids``. Empty: the same prompt.
    """

    row: int
    ids: tuple[int, ...]
    completion_ids: tuple[int, ...] | None
    text: str
    file: int = 0
    loss_mask: tuple[bool, ...] = ()
    teacher_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A prompt with one completion.

    Attributes:
        row: 0-based row of the prompt in its file.
        sample_index: Index among the samples of this prompt, from 0.
        prompt_ids: Token ids of the prompt.
        completion_ids: Token ids of the completion, including the end-of-sequence token that stopped it.
        is_on_policy: Whether the student generated the completion.
        finish_reason: ``stop`` or ``length`` as in SGLang; ``data`` for completions from the dataset.
        weight_version: Version of the student weights that generated the completion; -1 for the dataset.
        file: Index of the file in data.prompts.
        prompt_loss_mask: True for prompt tokens that count in the loss. Empty: none.
        teacher_prompt_ids: The teacher's prompt. Empty: the same prompt.

    Raises:
        ValueError: Empty prompt, unknown finish reason, or a mask that does not match the prompt.
    """

    row: int
    sample_index: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    is_on_policy: bool
    finish_reason: FinishReason
    weight_version: int
    file: int = 0
    prompt_loss_mask: tuple[bool, ...] = ()
    teacher_prompt_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # Also guards against batches read from JSON, on every rank.
        if not self.prompt_ids:
            raise ValueError(
                f"sample {self.sample_index} of row {self.row} has an empty prompt: no position predicts its first token"
            )
        if self.finish_reason not in get_args(FinishReason):
            raise ValueError(
                f"finish_reason {self.finish_reason!r} of row {self.row} is not one of {get_args(FinishReason)}"
            )
        if mask := self.prompt_loss_mask:
            if len(mask) != len(self.prompt_ids) or mask[0]:
                raise ValueError(
                    f"prompt_loss_mask of row {self.row} needs one flag for each of {len(self.prompt_ids)} tokens, the first "
                    f"of them False; it has {len(mask)}"
                )
            if self.teacher_prompt_ids:
                raise ValueError(
                    f"row {self.row}: the teacher's own prompt has no logits for prompt_loss_mask"
                )

    @property
    def num_tokens(self) -> int:
        """Length of prompt plus completion."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Number of tokens that count in the loss."""
        return sum(self.prompt_loss_mask) + len(self.completion_ids)

    def loss_mask(self, seq_length: int) -> list[bool]:
        """Return one flag per position, True where token i + 1 counts in the loss.

        Without ``prompt_loss_mask``: exactly for i in [len(prompt) - 1, len(prompt) + len(completion) - 2].
        """
        counts = (self.prompt_loss_mask or (False,) * len(self.prompt_ids)) + (True,) * len(
            self.completion_ids
        )
        # Shifted by one: the logits at position i predict token i + 1.
        return [*counts[1:], *[False] * (seq_length - len(counts) + 1)]


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded sequences of one forward pass, on the CPU.

    Rows from ``len(indices)`` on are padding only and have no loss.
    """

    tokens_BS: Tensor  # int64
    position_ids_BS: Tensor  # int64, 0 .. S - 1 in every row
    loss_mask_BS: Tensor  # bool; position i is True if token i + 1 counts in the loss
    indices: tuple[int, ...]  # row b holds sample indices[b] of the batch


@dataclass(frozen=True)
class Batch:
    """The samples of one iteration across all data-parallel ranks."""

    samples: tuple[Sample, ...]

    @property
    def num_loss_tokens(self) -> int:
        """Number of loss tokens of all samples, the divisor of the summed loss."""
        return sum(sample.num_loss_tokens for sample in self.samples)

    def as_read_by_teacher(self) -> Batch:
        """Return the batch with the teacher's prompts; its loss tokens are the same, in order."""
        return Batch(
            tuple(
                replace(sample, prompt_ids=sample.teacher_prompt_ids, teacher_prompt_ids=())
                if sample.teacher_prompt_ids
                else sample
                for sample in self.samples
            )
        )

    def padded_length(self, multiple_of: int) -> int:
        """Return the length of the longest sequence, rounded up to a multiple of ``multiple_of``."""
        # Sequence parallelism splits S over the TP ranks, hence the multiple.
        longest = max(sample.num_tokens for sample in self.samples)
        return -(-longest // multiple_of) * multiple_of

    def micro_batches(
        self, micro_batch_size: int, *, dp_rank: int, dp_size: int, seq_length: int, pad_id: int
    ) -> list[MicroBatch]:
        """Split this data-parallel rank's samples into micro-batches of equal shape.

        Rank r of d owns samples [r n / d, (r + 1) n / d), in order. The last micro-batch is filled with padding rows
        if their number is not a multiple of ``micro_batch_size``.

        Args:
            micro_batch_size: B of every micro-batch.
            dp_rank: Rank in the data-parallel group.
            dp_size: Size of the data-parallel group; divides the number of samples.
            seq_length: S; every sequence is padded to it on the right.
            pad_id: Padding token, any valid id.

        Returns:
            ceil(n / dp_size / micro_batch_size) micro-batches.

        Raises:
            ValueError: ``dp_size`` does not divide the number of samples, or one is longer than ``seq_length``.
        """
        num_local, rest = divmod(len(self.samples), dp_size)
        if rest or not 0 <= dp_rank < dp_size:
            raise ValueError(
                f"{len(self.samples)} samples cannot be split for rank {dp_rank} of {dp_size} data-parallel ranks; "
                "make train.global_batch_size a multiple of the data-parallel size"
            )
        start, end = dp_rank * num_local, (dp_rank + 1) * num_local
        # Equal shapes: pipeline stages post their receives with the shape that the schedule was given.
        return [
            self._pad(range(first, min(first + micro_batch_size, end)), micro_batch_size, seq_length, pad_id)
            for first in range(start, end, micro_batch_size)
        ]

    def _pad(self, indices: range, num_rows: int, seq_length: int, pad_id: int) -> MicroBatch:
        tokens_BS = torch.full((num_rows, seq_length), pad_id, dtype=torch.int64)
        loss_mask_BS = torch.zeros((num_rows, seq_length), dtype=torch.bool)
        for b, index in enumerate(indices):
            sample = self.samples[index]
            if sample.num_tokens > seq_length:
                raise ValueError(
                    f"the sequence of row {sample.row} has {len(sample.prompt_ids)} prompt and "
                    f"{len(sample.completion_ids)} completion tokens, more than seq_length {seq_length}; "
                    "lower data.max_prompt_length or rollout.max_new_tokens, or pad to a longer length"
                )
            tokens_BS[b, : sample.num_tokens] = torch.tensor(sample.prompt_ids + sample.completion_ids)
            loss_mask_BS[b] = torch.tensor(sample.loss_mask(seq_length))
        position_ids_BS = torch.arange(seq_length).repeat(num_rows, 1)
        return MicroBatch(tokens_BS, position_ids_BS, loss_mask_BS, tuple(indices))

    def to_json(self) -> dict[str, Any]:
        """Return lists and numbers, for a broadcast without pickle."""
        return {"samples": [asdict(sample) for sample in self.samples]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Batch:
        """Restore a batch from ``to_json``.

        Raises:
            ValueError: ``value`` was not written by this version's ``to_json``.
        """
        try:
            samples = tuple(_sample_from_json(fields) for fields in value["samples"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a batch written by Batch.to_json: {error!r}") from error
        return cls(samples)


@dataclass(frozen=True)
class Sharding:
    """How a rank cuts its share of a batch into micro-batches; arguments as those of ``Batch.micro_batches``."""

    micro_batch_size: int
    dp_rank: int
    dp_size: int
    pad_id: int
    multiple_of: int
    """The padded length is a multiple of it, so that sequence parallelism can split the positions."""

    def micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """This rank's micro-batches, padded to the longest sequence of the batch."""
        return batch.micro_batches(
            self.micro_batch_size,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            seq_length=batch.padded_length(self.multiple_of),
            pad_id=self.pad_id,
        )


def _sample_from_json(fields: Mapping[str, Any]) -> Sample:
    # JSON has no tuples; samples are hashable values and need them back.
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return Sample(**values)
