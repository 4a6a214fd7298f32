"""What a model family has to say: which Hugging Face tensors make up each Megatron parameter."""

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
    """

    model_type: str
    layer: tuple[WeightMap, ...]
    outer: tuple[WeightMap, ...]
