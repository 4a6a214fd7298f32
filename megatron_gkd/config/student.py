"""The student section: the model that learns, its layout, recomputation and adapters."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_gkd.config.base import Config, Fixed, Free, Patterns
from megatron_gkd.config.model import ModelConfig, ParallelConfig

LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


class StudentParallelConfig(ParallelConfig):
    """How one copy of the student is spread over ranks; all other ranks hold further copies (data parallel)."""

    virtual_pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """Chunks of layers on every pipeline stage; more shorten the idle time at both ends of an iteration
    and cost more communication. Needs pipeline_model_parallel_size > 1."""

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
    """Activations that the backward pass computes again instead of keeping them: less memory, more time."""

    granularity: Literal["none", "selective", "full"] = "none"
    """selective: only the parts named by modules; full: whole layers, of which only the input is kept."""
    modules: tuple[Literal["core_attn", "mlp"], ...] = Field(default=("core_attn",), min_length=1)
    """Parts of every layer that selective computes again; core_attn is what Transformer Engine's fused
    attention does by itself."""
    method: Literal["uniform", "block"] = "uniform"
    """Layers that full computes again. uniform: all, keeping the input of every num_layers-th; block: the
    first num_layers of each pipeline stage, one by one."""
    num_layers: int = Field(default=1, ge=1)
    """See method."""


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


class StudentConfig(ModelConfig):
    """The model that learns."""

    parallel: Free[StudentParallelConfig] = StudentParallelConfig()
    recompute: Free[RecomputeConfig] = RecomputeConfig()
    make_vocab_size_divisible_by: Free[int] = Field(default=1, ge=1)
    """The vocabulary is padded to a multiple of this times the tensor-parallel size; the padding takes no
    part in the loss."""
    freeze: Fixed[Patterns] = ()
    """Glob patterns of weights that are not trained, such as model.embed_tokens.weight or decoder.layers.[0-7].*, on
    Hugging Face or Megatron names with the layer's number in the whole model. Patterns that match nothing, or a part of
    what Megatron keeps in one parameter (q, k and v; gate and up), are refused."""

    lora: Fixed[LoraConfig] = LoraConfig()

    @model_validator(mode="after")
    def _freeze_or_lora(self) -> Self:
        if self.freeze and self.lora.rank:
            raise ValueError(
                f"freeze={list(self.freeze)} and lora.rank={self.lora.rank} are both given, and adapters leave every "
                "weight of the student frozen; remove freeze"
            )
        return self
