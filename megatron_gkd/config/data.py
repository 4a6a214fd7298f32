"""The data section: which files, how their rows are read, and what is done about odd ones."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from megatron_gkd.config.base import Config, Free


def _as_list(value: Any) -> Any:
    """A single path is a list of one."""
    values = [value] if isinstance(value, str | Path) else value
    if isinstance(values, list | tuple) and "" in values:
        raise ValueError("a path is empty; remove it")
    return values


Files = Annotated[tuple[Path, ...], BeforeValidator(_as_list)]


class DataConfig(Config):
    """Prompts, and completions for the off-policy share."""

    prompts: Files
    """A file, or a list of files: .parquet, .txt with one prompt per line, anything else JSON lines. docs/data.md
    shows the rows."""
    weights: tuple[float, ...] = ()
    """Share of the prompts that each file of data.prompts gives, such as [3, 1]; empty: every row of all files once
    in each pass."""
    dataset_class: str | None = None
    """Own reader, as package.module:Name or file.py:Name. Name(path) is iterated over and gives one mapping per
    row; null: the reader follows from the file's name."""
    prompt_key: str = Field(default="prompt", min_length=1)
    """Column with the prompt: a text, or chat messages up to where the assistant is to speak."""
    completion_key: str = Field(default="completion", min_length=1)
    """Column with the completion, a text; used where gkd.lmbda is below 1."""
    messages_key: str = Field(default="messages", min_length=1)
    """Column with a whole conversation, read where a row has no prompt: the last assistant turn is the completion,
    and from data the earlier ones count in the loss too."""
    teacher_prompt_key: str = Field(default="teacher_prompt", min_length=1)
    """Column with what the teacher reads in place of the prompt (a text or chat messages), such as a prompt with
    the solution; it scores the same completion tokens."""
    max_prompt_length: int = Field(default=512, ge=1)
    """Tokens of the longest prompt that is used, with the chat template."""
    max_teacher_prompt_length: int | None = Field(default=None, ge=1)
    """The same for the teacher's own prompts; null: data.max_prompt_length."""
    truncation: Literal["error", "left", "right"] = "error"
    """left and right cut the beginning or the end of longer prompts. error: nothing is cut, data.overlong_prompts
    decides. Completions are never cut."""
    overlong_prompts: Literal["drop", "error"] = "drop"
    """drop: longer prompts are counted and left out; error: they stop the run."""
    max_bad_rows: Free[int] = Field(default=0, ge=0)
    """Unreadable rows of a pass that are reported and left out before the run stops."""
    shuffle: bool = True
    """Draw the prompts of every pass in a new random order."""
    streaming: bool = False
    """Read rows while training, for files larger than memory; else all are read and checked before."""
    shuffle_rows: int = Field(default=4096, ge=1)
    """With streaming: rows held in memory of each file; they are read in order and shuffled among themselves."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, or a SentencePiece model file; null: the student's folder."""
    tokenizer_kind: Literal["auto", "hf", "sentencepiece"] = "auto"
    """hf: tokenizer.json and tokenizer_config.json; sentencepiece: tokenizer.model; auto: what is there, hf
    first."""
    chat_template: str | None = None
    """Chat template to use in place of the tokenizer's own: a file in Jinja, or package.module:NAME or file.py:NAME of a
    text in Jinja."""

    @property
    def teacher_prompt_length(self) -> int:
        """Tokens of the longest prompt that the teacher reads."""
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
