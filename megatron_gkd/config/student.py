"""The student section: the trained model with its layout, recomputation and adapters."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_gkd.config.base import Config, Fixed, Free, Patterns
from megatron_gkd.config.model import ModelConfig, ParallelConfig

LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


class StudentParallelConfig(ParallelConfig):
    """Layout of one copy of the student; the remaining ranks hold further copies (data parallel)."""

    virtual_pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """Chunks of layers per pipeline stage (interleaved schedule): a smaller pipeline bubble for more communication. Needs
    pipeline_model_parallel_size > 1."""

    @model_validator(mode="after")
    def _virtual_stages_need_a_pipeline(self) -> Self:
        chunks, pp = self.virtual_pipeline_model_parallel_size, self.pipeline_model_parallel_size
        if chunks > 1 and pp == 1:
            raise ValueError(
                f"virtual_pipeline_model_parallel_size={chunks} needs pipeline_model_parallel_size > 1 (it is 1); "
                "raise it or set virtual_pipeline_model_parallel_size=1"
            )
        return self


class RecomputeConfig(Config):
    """Activation recomputation in the backward pass: less memory for more time."""

    granularity: Literal["none", "selective", "full"] = "none"
    """selective: the parts listed in modules; full: whole layers, which keep only their input."""
    modules: tuple[Literal["core_attn", "mlp"], ...] = Field(default=("core_attn",), min_length=1)
    """Parts of every layer that selective recomputes. Transformer Engine's fused attention recomputes core_attn by
    itself."""
    method: Literal["uniform", "block"] = "uniform"
    """Layers that full recomputes. uniform: all, in groups of num_layers that keep one input; block: the first num_layers
    of each pipeline stage, one by one."""
    num_layers: int = Field(default=1, ge=1)
    """Layers per group for uniform, layers per pipeline stage for block."""


class LoraConfig(Config):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * B A with W frozen, A and B trained."""

    rank: int = Field(default=0, ge=0)
    """Rank of the adapters; 0: no adapters, all weights are trained."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale of the adapters, divided by rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of A in training."""
    targets: tuple[LoraTarget, ...] = Field(
        default=("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), min_length=1
    )
    """Linear layers with an adapter, by Megatron's names: linear_qkv is q_proj, k_proj and v_proj with a shared A,
    linear_proj is o_proj, linear_fc1 is gate_proj and up_proj with a shared A, linear_fc2 is down_proj."""


class StudentConfig(ModelConfig):
    """The trained model."""

    parallel: Free[StudentParallelConfig] = StudentParallelConfig()
    recompute: Free[RecomputeConfig] = RecomputeConfig()
    make_vocab_size_divisible_by: Free[int] = Field(default=1, ge=1)
    """The vocabulary is padded to a multiple of this times tensor_model_parallel_size; the loss ignores the padding."""
    freeze: Fixed[Patterns] = ()
    """Glob patterns of frozen weights, such as model.embed_tokens.weight or decoder.layers.[0-7].*, matched against
    Hugging Face and Megatron names with global layer numbers. A pattern that matches nothing, or only a part of a fused
    Megatron parameter (q, k and v; gate and up), is an error."""
    lora: Fixed[LoraConfig] = LoraConfig()

    @model_validator(mode="after")
    def _freeze_or_lora(self) -> Self:
        if self.freeze and self.lora.rank:
            raise ValueError(
                f"freeze={list(self.freeze)} and lora.rank={self.lora.rank} are both given, but adapters already freeze "
                "every weight of the student; remove freeze"
            )
        return self
