"""From the sizes in config.json and the layout to Megatron's TransformerConfig."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from megatron_gkd.config import RecomputeConfig
from megatron_gkd.config.hf_shapes import HfShapes
from megatron_gkd.parallel.groups import ModelGroups
from megatron_gkd.platform.kernels import Kernels


def transformer_config(
    shapes: HfShapes,
    groups: ModelGroups,
    *,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute: RecomputeConfig,
    kernels: Kernels,
    on_cpu: bool,
) -> TransformerConfig:
    """Megatron's description of a dense Llama-like model."""
    has_te = kernels.transformer_engine
    is_interleaved = groups.layout.vpp_size > 1
    return TransformerConfig(
        num_layers=shapes.num_layers,
        hidden_size=shapes.hidden_size,
        ffn_hidden_size=shapes.ffn_hidden_size,
        num_attention_heads=shapes.num_attention_heads,
        num_query_groups=shapes.num_query_groups,
        kv_channels=shapes.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shapes.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shapes.qkv_bias,
        qk_layernorm=shapes.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=groups.layout.tp_size,
        pipeline_model_parallel_size=groups.layout.pp_size,
        virtual_pipeline_model_parallel_size=groups.layout.vpp_size if is_interleaved else None,
        # two stages that exchange several tensors at a time mix them up if they are sent as one batch: wrong losses
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        **_recompute_options(recompute),
        # weights are always loaded, never drawn
        use_cpu_initialization=on_cpu,
        perform_initialization=False,
        attention_backend=AttnBackend[kernels.attention],
        gradient_accumulation_fusion=kernels.apex_gradient_fusion,
        # fusions need torch.compile or CUDA kernels; they change no result
        bias_activation_fusion=not on_cpu,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=has_te,
        persist_layer_norm=has_te,
    )


def _recompute_options(recompute: RecomputeConfig) -> dict[str, Any]:
    match recompute.granularity:
        case "none":
            return {}
        case "selective":
            return {"recompute_granularity": "selective", "recompute_modules": list(recompute.modules)}
        case "full":
            return {
                "recompute_granularity": "full",
                "recompute_method": recompute.method,
                "recompute_num_layers": recompute.num_layers,
            }
