"""Description of a model family: parameter names in Megatron and Hugging Face, and config.json defaults."""

from dataclasses import dataclass
from typing import Literal

# How a parameter is sharded over tensor-parallel ranks:
#   vocab       rows of the padded vocabulary
#   qkv         rows, with q, k and v interleaved per query group
#   gate_up     rows, with each shard's gate above its up
#   row         input columns (Megatron's RowParallelLinear)
#   replicated  not sharded
Kind = Literal["vocab", "qkv", "gate_up", "row", "replicated"]


@dataclass(frozen=True)
class WeightMap:
    """A Megatron parameter and the Hugging Face tensors it consists of.

    Attributes:
        megatron: Names in Megatron: with local layers first, then with Transformer Engine, which fuses norms into the
            following linear layer. ``{i}`` is the layer index on the stage.
        hf: Tensor names in the Hugging Face checkpoint; ``{i}`` is the global layer index.
        kind: How the parameter is sharded.
    """

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    kind: Kind


@dataclass(frozen=True)
class Family:
    """Weights and configuration defaults of a model family.

    Attributes:
        model_type: ``model_type`` in config.json.
        layer: Weights of one transformer layer.
        outer: Weights outside the layers, including the LM head of an untied model.
        may_omit: Optional keys of config.json: ``head_dim`` defaults to hidden_size / num_attention_heads,
            ``num_key_value_heads`` to num_attention_heads.
        default_sliding_window: Attention window if config.json lacks ``sliding_window``; ``None`` for a family without
            this key.
    """

    model_type: str
    layer: tuple[WeightMap, ...]
    outer: tuple[WeightMap, ...]
    may_omit: tuple[str, ...] = ("head_dim",)
    default_sliding_window: int | None = None

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the q, k and v projections have a bias."""
        return self._has_layer_weight("linear_qkv.bias")

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalized per head, before the rotary embedding."""
        return self._has_layer_weight("q_layernorm.weight")

    def _has_layer_weight(self, name: str) -> bool:
        return any(weight.megatron[0].endswith(name) for weight in self.layer)
