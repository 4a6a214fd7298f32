"""The optim section: optimizer, weight decay and learning-rate schedule."""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_gkd.config.base import Config, Fixed, Free, Patterns


class OptimConfig(Config):
    """Optimizer and its learning-rate schedule."""

    optimizer: Fixed[Literal["adam", "sgd"]] = "adam"
    """adam: AdamW, with decoupled weight decay; sgd: with momentum (not Nesterov), weight decay added to the
    gradient."""
    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate, reached after warm-up."""
    min_lr: float = Field(default=0.0, ge=0)
    """Final learning rate of the decay; at most lr."""
    decay_style: Literal["constant", "linear", "cosine", "inverse_square_root", "wsd"] = "constant"
    """Learning rate after warm-up. constant: lr; linear and cosine: decay from lr to min_lr at the end of the run;
    inverse_square_root: lr * sqrt(warm-up / iteration), at least min_lr; wsd (warm-up, stable, decay): lr with a decay
    to min_lr in the last iterations."""
    warmup_iters: int = Field(default=0, ge=0)
    """Iterations of linear warm-up from 0 to lr."""
    warmup_fraction: float = Field(default=0.0, ge=0, le=1)
    """Warm-up as a share of the run's iterations, rounded; give this or warmup_iters."""
    wsd_decay_fraction: float = Field(default=0.1, gt=0, le=1)
    """Decay phase of decay_style=wsd as a share of the run's iterations; at least one iteration."""
    wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """Decay of wsd as a function of its progress x in [0, 1]: 1 - x, half a cosine, 2 * 0.5^x - 1, or 1 - sqrt(x)."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of all weights except those of no_weight_decay."""
    no_weight_decay: Patterns = ("*.bias", "*norm.weight")
    """Glob patterns of weights without decay, matched as those of student.freeze; default: biases and norms."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the running mean of the gradient."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the running mean of the squared gradient."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator of the update."""
    sgd_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of optimizer=sgd."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; larger gradients are scaled down to it. 0: no clipping."""
    use_distributed_optimizer: Fixed[bool] = False
    """Shard the optimizer state over the data-parallel ranks, which saves memory; needs optimizer=adam."""
    overlap_grad_reduce: Free[bool] = False
    """Overlap the data-parallel reduction of gradients with the backward pass."""

    def num_warmup_iters(self, train_iters: int) -> int:
        """Warm-up iterations of a run of ``train_iters``."""
        return self.warmup_iters or round(self.warmup_fraction * train_iters)

    def num_wsd_decay_iters(self, train_iters: int) -> int:
        """Iterations of the decay phase of wsd in a run of ``train_iters``."""
        return max(1, round(self.wsd_decay_fraction * train_iters))

    def schedule_problems(self, train_iters: int) -> Iterator[str]:
        """Phases of the schedule that do not fit into a run of ``train_iters``, one message each."""
        warmup, decay = self.num_warmup_iters(train_iters), self.num_wsd_decay_iters(train_iters)
        if warmup > train_iters:
            yield (
                f"optim.warmup_iters={self.warmup_iters} is above train.train_iters={train_iters}; "
                "the run would end before the warm-up"
            )
        elif self.decay_style == "wsd" and warmup + decay > train_iters:
            yield (
                f"optim.decay_style=wsd: {warmup} iterations of warm-up and {decay} of decay (optim.wsd_decay_fraction="
                f"{self.wsd_decay_fraction}) are more than the run's {train_iters}; shorten one of them"
            )

    @model_validator(mode="after")
    def _min_lr_is_not_above_lr(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}; lower min_lr")
        return self

    @model_validator(mode="after")
    def _distributed_optimizer_is_adam(self) -> Self:
        if self.use_distributed_optimizer and self.optimizer != "adam":
            raise ValueError(
                f"use_distributed_optimizer=true saves and loads Adam's state only, but optimizer={self.optimizer}; "
                "set use_distributed_optimizer=false or optimizer=adam"
            )
        return self

    @model_validator(mode="after")
    def _one_length_of_warmup(self) -> Self:
        if self.warmup_iters and self.warmup_fraction:
            raise ValueError(
                f"warmup_iters={self.warmup_iters} and warmup_fraction={self.warmup_fraction} are both given; "
                "set one of them to 0"
            )
        return self
