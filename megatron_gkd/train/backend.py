"""The back end that computes the loss of a run with ``loss.backend: auto``."""

import logging
from typing import NamedTuple

import torch

from megatron_gkd.config import ConfigError, GkdConfig
from megatron_gkd.models.gpt import ShardedModel

log = logging.getLogger(__name__)

_SAVED_NS = 5.0
"""Time that ``compiled`` saves over ``eager`` per logit of the student; measured: 4 to 6.5 ns."""
_COMPILE_S = 30.0
"""Import of the compiler and compilation of a loss, measured on two busy cores."""
_WORTH = 3.0
"""Required ratio of time saved to compile time: tokens are an upper bound, and the certificate compiles too."""


class Choice(NamedTuple):
    """A back end and the reason for it."""

    backend: str
    reason: str


def with_backend(
    config: GkdConfig, *, tp_size: int, dp_size: int, vocab_size: int, device: torch.device
) -> GkdConfig:
    """The configuration with ``loss.backend: auto`` replaced; logs the choice and its reason."""
    if config.loss.backend != "auto":
        return config
    if device.type == "cpu":
        choice = _choose_on_cpu(config, tp_size, dp_size, vocab_size)
    else:
        choice = Choice("auto", "on a GPU Triton's kernels compute what they have a formula for")
    log.info("Loss back end: %s, because %s", choice.backend, choice.reason)
    loss = config.loss.model_copy(update={"backend": choice.backend})
    return config.model_copy(update={"loss": loss})


def with_backend_of(config: GkdConfig, student: ShardedModel, device: torch.device) -> GkdConfig:
    """``with_backend`` for the layout and vocabulary of a built student."""
    layout = student.groups.layout
    return with_backend(
        config,
        tp_size=layout.tp_size,
        dp_size=layout.dp_size,
        vocab_size=student.shapes.vocab_size,
        device=device,
    )


def require_loss_backend(config: GkdConfig, device: torch.device) -> None:
    """Check that this device can compute the loss.

    Raises:
        ConfigError: Names the key.
    """
    if config.loss.backend == "triton" and device.type == "cpu":
        raise ConfigError(
            "loss.backend=triton needs a GPU, and no CUDA device is visible; set loss.backend=auto"
        )


def _choose_on_cpu(config: GkdConfig, tp_size: int, dp_size: int, vocab_size: int) -> Choice:
    loss = config.loss
    if (
        not config.teacher.gives_full_distribution
        or loss.support != "full"
        or loss.divergence == "adaptive_kl"
    ):
        return Choice(
            "eager", "only divergences on the whole vocabulary have another one, and adaptive_kl has none"
        )
    # on one rank, if every completion had the full length
    num_tokens = (
        (config.train.train_iters or 0)
        * config.train.global_batch_size
        * config.rollout.max_new_tokens
        / dp_size
    )
    saved_s = num_tokens * vocab_size / tp_size * _SAVED_NS * 1e-9
    is_worth_it = saved_s >= _WORTH * _COMPILE_S
    return Choice(
        "compiled" if is_worth_it else "eager",
        f"compiling takes about {_COMPILE_S:.0f} s and saves at most {saved_s:.0f} s of this run",
    )
