"""Megatron's DDP wrapper and Adam, and the question that every rank must answer alike: are the gradients finite?"""

from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_gkd.config.schema import OptimConfig
from megatron_gkd.parallel.groups import ModelGroups


def wrap_ddp(model: GPTModel, groups: ModelGroups) -> DistributedDataParallel:
    """Data parallelism with gradients summed in fp32."""
    # calculate_per_token_loss: gradients are summed here and divided by the global token count when finished
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, check_for_nan_in_grad=False)
    ddp = DistributedDataParallel(model.config, ddp_config, model, pg_collection=groups.pg)
    model.config.finalize_model_grads_func = finalize_model_grads
    return ddp


def build_optimizer(
    ddp: DistributedDataParallel, groups: ModelGroups, config: OptimConfig, dtype: torch.dtype
) -> MegatronOptimizer:
    """AdamW with decoupled weight decay; fp32 main parameters where the model is bf16. Collective over all ranks."""
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
    )
    optimizer = get_megatron_optimizer(
        optimizer_config, [ddp], use_gloo_process_groups=False, pg_collection=groups.pg
    )
    config_of_model: Any = ddp.module.config
    config_of_model.grad_scale_func = optimizer.scale_loss
    optimizer.reload_model_params()
    return optimizer


def zero_gradients(ddp: DistributedDataParallel, optimizer: MegatronOptimizer) -> None:
    """Clear Megatron's gradient buffers and the optimizer's references to them."""
    ddp.zero_grad_buffer()
    optimizer.zero_grad()


def has_finite_gradients(ddp: DistributedDataParallel) -> bool:
    """Whether every gradient held by this rank is finite; one pass over the buffers."""
    buffers: Any = ddp.buffers  # Megatron's own, not torch's method of that name
    return all(bool(torch.isfinite(buffer.grad_data.sum())) for buffer in buffers)
