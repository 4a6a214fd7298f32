"""Llama 2 and 3, SmolLM2 and other models with ``model_type: llama``."""

from megatron_gkd.families.base import Family, WeightMap

_LAYER, _HF = "decoder.layers.{i}.", "model.layers.{i}."

OUTER = (
    WeightMap(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), "vocab"),
    WeightMap(("decoder.final_layernorm.weight",), ("model.norm.weight",), "replicated"),
    WeightMap(("output_layer.weight",), ("lm_head.weight",), "vocab"),
)
LAYER = (
    WeightMap(
        (_LAYER + "self_attention.linear_qkv.weight",),
        tuple(_HF + f"self_attn.{x}_proj.weight" for x in "qkv"),
        "qkv",
    ),
    WeightMap((_LAYER + "self_attention.linear_proj.weight",), (_HF + "self_attn.o_proj.weight",), "row"),
    WeightMap(
        (_LAYER + "mlp.linear_fc1.weight",),
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        "gate_up",
    ),
    WeightMap((_LAYER + "mlp.linear_fc2.weight",), (_HF + "mlp.down_proj.weight",), "row"),
    WeightMap(
        (_LAYER + "input_layernorm.weight", _LAYER + "self_attention.linear_qkv.layer_norm_weight"),
        (_HF + "input_layernorm.weight",),
        "replicated",
    ),
    WeightMap(
        (_LAYER + "pre_mlp_layernorm.weight", _LAYER + "mlp.linear_fc1.layer_norm_weight"),
        (_HF + "post_attention_layernorm.weight",),
        "replicated",
    ),
)

# Llama 2 7B and 13B have no num_key_value_heads: multi-head attention.
LLAMA = Family("llama", LAYER, OUTER, may_omit=("head_dim", "num_key_value_heads"))
