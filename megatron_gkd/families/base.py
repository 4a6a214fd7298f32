"""What a model family has to say: its tensors in Megatron and in Hugging Face files, and how its config.json is read."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["vocab", "qkv", "gate_up", "row", "replicated"]
"""How a Megatron parameter is cut.

vocab: vocabulary rows, padded. qkv: q, k and v interleaved per query group, then rows. gate_up: gate over up on each
shard, rows. row: input columns (Megatron's RowParallelLinear). replicated: whole on every tensor-parallel rank.
"""


@dataclass(frozen=True)
class WeightMap:
    """One Megatron parameter and its Hugging Face counterpart.

    Attributes:
        megatron: Names of the parameter in Megatron, ``{i}`` for the layer index on the stage; the first with plain torch
            layers, further ones with Transformer Engine, which moves norms into the linear layer behind them.
        hf: Tensor names in the Hugging Face checkpoint, ``{i}`` for the global layer index.
        kind: How it is cut.
    """

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    kind: Kind


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model_type: ``model_type`` in config.json.
        layer: Weights of one transformer layer.
        outer: Weights outside the layers, the head of an untied model included.
        may_omit: Keys that config.json may lack: ``head_dim`` is then hidden_size / num_attention_heads, and
            ``num_key_value_heads`` the number of attention heads.
        default_sliding_window: Positions that attention reaches back over if config.json lacks ``sliding_window``;
            ``None`` for a family that does not heed this key.
    """

    model_type: str
    layer: tuple[WeightMap, ...]
    outer: tuple[WeightMap, ...]
    may_omit: tuple[str, ...] = ("head_dim",)
    default_sliding_window: int | None = None

    @property
    def has_qkv_bias(self) -> bool:
        """Whether q, k and v have a bias."""
        return self._has_layer_weight("linear_qkv.bias")

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalized head by head, before the rotary embedding."""
        return self._has_layer_weight("q_layernorm.weight")

    def _has_layer_weight(self, name: str) -> bool:
        return any(weight.megatron[0].endswith(name) for weight in self.layer)
