"""The values that travel from prompts to the loss.

Shapes: B = sequences in a micro-batch, S = positions of a padded sequence.
Everything here is plain data: no process group, no device.
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
    """One row of the prompt file, encoded."""

    row: int
    """0-based line of the file; the line number that an editor shows is row + 1."""
    ids: tuple[int, ...]
    completion_ids: tuple[int, ...] | None
    """The data set's own completion, ending with an end-of-sequence token; None if the row has none."""
    text: str
    """The prompt as the model sees it (after the chat template), for logs."""
    file: int = 0
    """Place of the file in data.prompts."""
    loss_mask: tuple[bool, ...] = ()
    """Which prompt tokens are earlier assistant turns, and count when the completion is taken from data; none if empty."""
    teacher_ids: tuple[int, ...] = ()
    """What the teacher reads in place of ``ids``; the same if empty."""


@dataclass(frozen=True)
class Sample:
    """A prompt with one completion.

    Raises:
        ValueError: Empty prompt, unknown finish reason, or a mask that does not fit the prompt.
    """

    row: int
    sample_index: int
    """Which of the samples of this prompt, from 0."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """Includes the end-of-sequence token if the model stopped with it, and nothing after it."""
    is_on_policy: bool
    finish_reason: FinishReason
    weight_version: int
    """Version of the student's weights that wrote the completion; -1 for completions from data."""
    file: int = 0
    """Place of the file in data.prompts."""
    prompt_loss_mask: tuple[bool, ...] = ()
    """Which prompt tokens count in the loss beside the completion; none if empty."""
    teacher_prompt_ids: tuple[int, ...] = ()
    """What the teacher reads before the completion; the same prompt if empty."""

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(
                f"sample {self.sample_index} of row {self.row} has an empty prompt: nothing predicts its first token"
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
                raise ValueError(f"row {self.row}: the teacher's own prompt has no rows for prompt_loss_mask")

    @property
    def num_tokens(self) -> int:
        """Length of prompt and completion together."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that count in the loss."""
        return sum(self.prompt_loss_mask) + len(self.completion_ids)

    def loss_mask(self, seq_length: int) -> list[bool]:
        """One flag per position: True where position i predicts a token i + 1 that counts.

        Without ``prompt_loss_mask``: exactly for i in [len(prompt) - 1, len(prompt) + len(completion) - 2].
        """
        counts = (self.prompt_loss_mask or (False,) * len(self.prompt_ids)) + (True,) * len(
            self.completion_ids
        )
        return [*counts[1:], *[False] * (seq_length - len(counts) + 1)]


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded sequences that one forward takes.

    All tensors are [B, S] on the CPU. Rows from ``len(indices)`` on are blank: padding only, no loss.
    """

    tokens_BS: Tensor
    """int64."""
    position_ids_BS: Tensor
    """int64, 0 .. S - 1 in every row."""
    loss_mask_BS: Tensor
    """bool; position i of a row is True when token i + 1, which it predicts, counts in the loss."""
    indices: tuple[int, ...]
    """Row b holds sample ``indices[b]`` of the batch."""


@dataclass(frozen=True)
class Batch:
    """The samples of one iteration, of all data-parallel ranks."""

    samples: tuple[Sample, ...]

    @property
    def num_loss_tokens(self) -> int:
        """Tokens of all samples that count: the number that the summed loss is divided by."""
        return sum(sample.num_loss_tokens for sample in self.samples)

    def as_read_by_teacher(self) -> Batch:
        """The same batch with the teacher's own prompts where there are any; its loss tokens are the same, in the same
        order."""
        return Batch(
            tuple(
                replace(sample, prompt_ids=sample.teacher_prompt_ids, teacher_prompt_ids=())
                if sample.teacher_prompt_ids
                else sample
                for sample in self.samples
            )
        )

    def padded_length(self, multiple_of: int) -> int:
        """Length of the longest sequence, rounded up to a multiple of ``multiple_of``."""
        longest = max(sample.num_tokens for sample in self.samples)
        return -(-longest // multiple_of) * multiple_of

    def micro_batches(
        self, micro_batch_size: int, *, dp_rank: int, dp_size: int, seq_length: int, pad_id: int
    ) -> list[MicroBatch]:
        """This data-parallel rank's samples, in order, as micro-batches of one shape.

        Rank r of d owns samples [r n / d, (r + 1) n / d). If they are no multiple of ``micro_batch_size``, the
        last micro-batch is filled up with blank rows, so that a pipeline schedule sees one shape only.

        Args:
            micro_batch_size: B of every micro-batch.
            dp_rank: This rank's place among the data-parallel ranks.
            dp_size: Number of data-parallel ranks; divides the number of samples.
            seq_length: S; every sequence is padded to it on the right.
            pad_id: Token of the padding, any valid id.

        Returns:
            ceil(n / dp_size / micro_batch_size) micro-batches.

        Raises:
            ValueError: The samples do not divide by ``dp_size``, or one is longer than ``seq_length``.
        """
        num_local, rest = divmod(len(self.samples), dp_size)
        if rest or not 0 <= dp_rank < dp_size:
            raise ValueError(
                f"{len(self.samples)} samples cannot be split for rank {dp_rank} of {dp_size} data-parallel ranks; "
                "make train.global_batch_size a multiple of the data-parallel size"
            )
        start, end = dp_rank * num_local, (dp_rank + 1) * num_local
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
        """Plain lists and numbers, to be broadcast without pickle."""
        return {"samples": [asdict(sample) for sample in self.samples]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Batch:
        """The batch that ``to_json`` wrote.

        Raises:
            ValueError: ``value`` was not written by ``to_json`` of this version.
        """
        try:
            samples = tuple(_sample_from_json(fields) for fields in value["samples"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a batch written by Batch.to_json: {error!r}") from error
        return cls(samples)


def _sample_from_json(fields: Mapping[str, Any]) -> Sample:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return Sample(**values)
