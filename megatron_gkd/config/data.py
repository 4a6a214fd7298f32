"""The data section: files of prompts, their columns, limits and order, and the tokenizer."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from megatron_gkd.config.base import Config, Free


def _as_list(value: Any) -> Any:
    """Accept a single path as a list of one."""
    values = [value] if isinstance(value, str | Path) else value
    if isinstance(values, list | tuple) and "" in values:
        raise ValueError("a path is empty; remove it")
    return values


Files = Annotated[tuple[Path, ...], BeforeValidator(_as_list)]


class DataConfig(Config):
    """Prompts, completions of the off-policy share, and the tokenizer."""

    prompts: Files
    """A file, or a list of files: .parquet, .txt with one prompt per line, JSON lines for any other suffix. docs/data.md
    describes the rows."""
    weights: tuple[float, ...] = ()
    """Relative share of the prompts from each file of data.prompts, such as [3, 1]; empty: every row of all files once
    per pass."""
    dataset_class: str | None = None
    """Custom reader, package.module:Name or file.py:Name; iterating over Name(path) yields one mapping per row. null: the
    reader of the file's suffix."""
    prompt_key: str = Field(default="prompt", min_length=1)
    """Column with the prompt: a text, or the chat messages before the assistant's turn."""
    completion_key: str = Field(default="completion", min_length=1)
    """Column with the completion, a text; read if gkd.lmbda is below 1."""
    messages_key: str = Field(default="messages", min_length=1)
    """Column with a whole conversation, read if a row has no prompt: the last assistant turn is the completion. In
    off-policy samples the earlier assistant turns are part of the loss, too."""
    teacher_prompt_key: str = Field(default="teacher_prompt", min_length=1)
    """Column with the teacher's own prompt (a text or chat messages), such as the prompt with its solution; the teacher
    scores the same completion tokens after it."""
    max_prompt_length: int = Field(default=512, ge=1)
    """Longest prompt in tokens, chat template included."""
    max_teacher_prompt_length: int | None = Field(default=None, ge=1)
    """Longest teacher prompt in tokens; null: data.max_prompt_length."""
    truncation: Literal["error", "left", "right"] = "error"
    """Side on which longer prompts are cut; error: none, see data.overlong_prompts. Completions are never cut."""
    overlong_prompts: Literal["drop", "error"] = "drop"
    """drop: count longer prompts and skip them; error: stop the run."""
    max_bad_rows: Free[int] = Field(default=0, ge=0)
    """Unreadable rows per pass that are reported and skipped; one more stops the run."""
    shuffle: bool = True
    """Shuffle the prompts in every pass."""
    streaming: bool = False
    """Read rows during training, for files larger than memory; otherwise all are read and checked first."""
    shuffle_rows: int = Field(default=4096, ge=1)
    """Rows of each streamed file that are held in memory and shuffled among themselves."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, or a SentencePiece model file; null: the folder of the student."""
    tokenizer_kind: Literal["auto", "hf", "sentencepiece"] = "auto"
    """hf: tokenizer.json and tokenizer_config.json; sentencepiece: tokenizer.model; auto: whichever exists, hf first."""
    chat_template: str | None = None
    """Jinja chat template that replaces the tokenizer's: a file, or package.module:NAME or file.py:NAME of a string."""

    @property
    def teacher_prompt_length(self) -> int:
        """Longest prompt that the teacher reads, in tokens."""
        return max(self.max_prompt_length, self.max_teacher_prompt_length or 0)

    @field_validator("prompts")
    @classmethod
    def _prompts_are_given(cls, files: tuple[Path, ...]) -> tuple[Path, ...]:
        if not files:
            raise ValueError("the list is empty; give at least one file")
        return files

    @field_validator("dataset_class")
    @classmethod
    def _dataset_class_has_two_parts(cls, value: str | None) -> str | None:
        if value is not None and not all(value.rpartition(":")):
            raise ValueError("must be package.module:Name or file.py:Name")
        return value

    @model_validator(mode="after")
    def _one_weight_per_file(self) -> Self:
        if self.weights and len(self.weights) != len(self.prompts):
            raise ValueError(
                f"weights={list(self.weights)} has {len(self.weights)} numbers for {len(self.prompts)} files of prompts; "
                "give one per file"
            )
        if any(weight <= 0 for weight in self.weights):
            raise ValueError(
                f"weights={list(self.weights)}: every weight must be above 0; to leave a file out, remove it from prompts"
            )
        return self

    @model_validator(mode="after")
    def _keys_are_different(self) -> Self:
        keys = [self.prompt_key, self.completion_key, self.messages_key, self.teacher_prompt_key]
        if len(set(keys)) < len(keys):
            raise ValueError(
                f"prompt_key, completion_key, messages_key and teacher_prompt_key are {', '.join(keys)}; they must be "
                "four different columns"
            )
        return self
