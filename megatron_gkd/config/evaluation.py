"""The evaluation section: loss on held-out completions."""

from typing import Self

from pydantic import Field, model_validator

from megatron_gkd.config.base import Config
from megatron_gkd.config.data import Files


class EvaluationConfig(Config):
    """Loss on held-out completions."""

    files: Files = ()
    """A file or a list of files in the format of data.prompts; every row needs a completion. Empty: no evaluation."""
    interval: int = Field(default=0, ge=0)
    """Iterations between evaluations; 0: only after the last."""
    num_rows: int | None = Field(default=None, ge=1)
    """Rows used, from the start of the files; null: all."""

    @model_validator(mode="after")
    def _interval_needs_files(self) -> Self:
        if not self.files and (self.interval or self.num_rows):
            raise ValueError(
                f"interval={self.interval} and num_rows={self.num_rows} need evaluation.files, which is empty; give a file or "
                "remove them"
            )
        return self
