"""Qwen3 (dense): Llama with per-head norms on q and k."""

from megatron_gkd.families.base import Family, WeightMap
from megatron_gkd.families.llama import LAYER, OUTER

_QK_NORM = tuple(
    WeightMap(
        ("decoder.layers.{i}." + f"self_attention.{x}_layernorm.weight",),
        ("model.layers.{i}." + f"self_attn.{x}_norm.weight",),
        "replicated",
    )
    for x in "qk"
)

# head_dim is required: it is 128 whatever hidden_size / num_attention_heads is.
QWEN3 = Family("qwen3", (*LAYER, *_QK_NORM), OUTER, may_omit=())
