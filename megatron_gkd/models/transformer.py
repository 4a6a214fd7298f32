"""Megatron's TransformerConfig and rotary frequencies for the sizes in config.json.

Shapes: F = rotary frequencies, half of the head dimension.
"""

import math
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor

from megatron_gkd.config import RecomputeConfig
from megatron_gkd.config.hf_shapes import HfShapes, Llama3Scaling
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
    """``TransformerConfig`` of a dense Llama-like model."""
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
        # With virtual stages and PP = 2 two tensors travel between the same pair of ranks at a time, and batched p2p
        # mixes them up: wrong losses and gradients without an error (megatron-core 0.16.1 on gloo).
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # finalize_model_grads divides by the global number of loss tokens; the schedule would otherwise average the
        # micro-batches, whatever their token counts
        calculate_per_token_loss=True,
        **_recompute_options(recompute),
        # Weights are always loaded. False on a CPU logs "CPU RNG state changed within GPU RNG context" for each layer.
        use_cpu_initialization=on_cpu,
        perform_initialization=False,
        attention_backend=AttnBackend[kernels.attention],
        gradient_accumulation_fusion=kernels.apex_gradient_fusion,
        # the fusions need torch.compile or CUDA kernels and change no result
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


def rotary_frequencies(shapes: HfShapes) -> Tensor:
    """[F] radians per position in fp32, plain or with Llama 3.1's scaling."""
    exponent_F = torch.arange(0, shapes.head_dim, 2, dtype=torch.float32) / shapes.head_dim
    frequency_F = 1.0 / shapes.rope_theta**exponent_F
    return frequency_F if shapes.rope_scaling is None else _scale(frequency_F, shapes.rope_scaling)


def _scale(frequency_F: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Divide low frequencies by ``factor``, keep high ones, interpolate linearly in between."""
    # number of wavelengths in the original context
    waves_F = scaling.original_max_position_embeddings * frequency_F / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_F = ((waves_F - low) / (high - low)).clamp(0, 1)
    return kept_F * frequency_F + (1 - kept_F) * frequency_F / scaling.factor
