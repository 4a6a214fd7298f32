"""The student.lora section."""

from typing import Literal

from pydantic import Field

from megatron_gkd.config.base import Config

LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


class LoraConfig(Config):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): the student's weights W stay as they are, and
    W + alpha / rank * B A is used, of which A and B are trained."""

    rank: int = Field(default=0, ge=0)
    """Rows of A and columns of B; 0: no adapters, all weights are trained."""
    alpha: float = Field(default=32.0, gt=0)
    """Strength of the adapters, divided by rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that an input of A is left out in training."""
    targets: tuple[LoraTarget, ...] = Field(
        default=("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), min_length=1
    )
    """Linear layers that get an adapter, by Megatron's names: linear_qkv is q_proj, k_proj and v_proj with one A in
    common, linear_proj is o_proj, linear_fc1 is gate_proj and up_proj with one A in common, linear_fc2 is
    down_proj."""
