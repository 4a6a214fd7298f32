"""Losses over a split vocabulary: distillation divergences and cross-entropy, of logits or of hidden states."""

from megatron_gkd.losses.distill import distill_loss, top_k_distill_loss
from megatron_gkd.losses.divergences import DIVERGENCES
from megatron_gkd.losses.linear import (
    linear_cross_entropy,
    linear_distill_loss,
    linear_top_k_distill_loss,
)

__all__ = [
    "DIVERGENCES",
    "distill_loss",
    "linear_cross_entropy",
    "linear_distill_loss",
    "linear_top_k_distill_loss",
    "top_k_distill_loss",
]
