"""The gkd and train sections: on-policy share, length, batch size and precision of the run."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_gkd.config.base import Config, Fixed, Free


class GkdSection(Config):
    """Generalized knowledge distillation (Agarwal et al. 2024, arXiv 2306.13649)."""

    lmbda: float = Field(default=0.5, ge=0, le=1)
    """Probability that the student generates the completion of a sample; otherwise it is read from data.prompts."""


class TrainConfig(Config):
    """Length, batch size, precision and output folder of the run."""

    train_iters: Free[int] = Field(default=0, ge=0)
    """Optimizer steps of the whole run, including those before a resume. Give this or epochs; 0: use epochs."""
    epochs: Free[float] = Field(default=0.0, ge=0)
    """Passes over the prompts, rounded up to whole iterations; 0: use train_iters."""
    global_batch_size: int = Field(ge=1)
    """Sequences per iteration over all ranks."""
    micro_batch_size: Free[int] = Field(default=1, ge=1)
    """Sequences in one forward and backward pass of the student on one rank."""
    seed: int = Field(default=1234, ge=0)
    """Seed of data order, on-policy choice, sampling and weight initialization."""
    output_dir: Free[Path]
    """Folder of everything that the run writes."""
    max_skipped_updates: Free[int] = Field(default=3, ge=0)
    """Consecutive updates that may be skipped for gradients that are not finite; one more ends the run."""
    precision: Fixed[Literal["fp32", "bf16"]] = "bf16"
    """Data type of weights and activations; the optimizer keeps fp32 weights in either case."""

    @model_validator(mode="after")
    def _exactly_one_length(self) -> Self:
        if bool(self.train_iters) == bool(self.epochs):
            given = "both are given, set one to 0" if self.epochs else "neither is given"
            raise ValueError(f"give exactly one of train_iters and epochs; {given}")
        return self
