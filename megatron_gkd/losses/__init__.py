"""Losses over a split vocabulary: distillation divergences and cross-entropy, of logits or of hidden states."""

from megatron_gkd.losses.distill import DistillLoss
from megatron_gkd.losses.divergences import DIVERGENCES
from megatron_gkd.losses.functional import (
    distill_loss,
    linear_cross_entropy,
    linear_distill_loss,
    linear_top_k_distill_loss,
    top_k_distill_loss,
)

__all__ = [
    "DIVERGENCES",
    "DistillLoss",
    "distill_loss",
    "linear_cross_entropy",
    "linear_distill_loss",
    "linear_top_k_distill_loss",
    "top_k_distill_loss",
]
