"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v."""

from megatron_gkd.families.base import Family, WeightMap
from megatron_gkd.families.llama import LAYER, OUTER

_QKV_BIAS = WeightMap(
    ("decoder.layers.{i}.self_attention.linear_qkv.bias",),
    tuple("model.layers.{i}." + f"self_attn.{x}_proj.bias" for x in "qkv"),
    "qkv",
)

QWEN2 = Family("qwen2", (*LAYER, _QKV_BIAS), OUTER)
