"""Megatron's DDP wrapper and its optimizers, and the question that every rank must answer alike: are the gradients finite?"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    ParamPredicate,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from megatron_gkd.config.optim import OptimConfig
from megatron_gkd.parallel.groups import ModelGroups


def wrap_ddp(
    chunks: Sequence[GPTModel], groups: ModelGroups, config: OptimConfig
) -> list[DistributedDataParallel]:
    """Data parallelism with gradients summed in fp32, for each chunk of this rank's model."""
    # calculate_per_token_loss: gradients are summed here and divided by the global token count when finished
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=False,
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_grad_reduce=config.overlap_grad_reduce,
    )
    config_of_model: Any = chunks[0].config  # one object for all chunks
    ddp = [
        # the first chunk is the last one in the backward pass: only its sums have nothing to hide behind
        DistributedDataParallel(
            config_of_model, ddp_config, chunk, disable_bucketing=i > 0, pg_collection=groups.pg
        )
        for i, chunk in enumerate(chunks)
    ]
    config_of_model.finalize_model_grads_func = finalize_model_grads
    if config.overlap_grad_reduce:
        # sums start with the last micro-batch, not with each
        no_sync = [chunk.no_sync for chunk in ddp]
        config_of_model.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return ddp


def build_optimizer(
    ddp: list[DistributedDataParallel],
    groups: ModelGroups,
    config: OptimConfig,
    dtype: torch.dtype,
    undecayed: Collection[Tensor] = (),
) -> MegatronOptimizer:
    """Megatron's optimizer; fp32 main parameters where the model is bf16. Collective over all ranks.

    Args:
        ddp: The wrapped model; parameters that need no gradient get no state.
        groups: Its layout and groups.
        config: What to build.
        dtype: Number format of the parameters.
        undecayed: Parameters without weight decay.
    """
    optimizer_config = OptimizerConfig(
        optimizer=config.optimizer,
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        sgd_momentum=config.sgd_momentum,
        clip_grad=config.clip_grad,
        use_distributed_optimizer=config.use_distributed_optimizer,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
    )
    chunks: list[Any] = ddp
    optimizer = get_megatron_optimizer(
        optimizer_config,
        chunks,
        config_overrides=_without_decay(undecayed),
        use_gloo_process_groups=False,
        pg_collection=groups.pg,
    )
    config_of_model: Any = ddp[0].module.config
    config_of_model.grad_scale_func = optimizer.scale_loss
    optimizer.reload_model_params()
    if config.optimizer == "sgd":
        _prepare_sgd_state(optimizer, config.sgd_momentum)
    return optimizer


def _without_decay(parameters: Collection[Tensor]) -> dict[ParamKey, ParamGroupOverride]:
    ids = {id(parameter) for parameter in parameters}
    key = ParamKey(predicate=ParamPredicate("no_weight_decay", lambda parameter: id(parameter) in ids))
    override: Any = {"wd_mult": 0.0}
    return {key: override}


def _prepare_sgd_state(optimizer: MegatronOptimizer, momentum: float) -> None:
    """Make SGD's state before a checkpoint is loaded into it, which Megatron does for Adam alone."""
    inner: Any = optimizer
    for part in inner.chained_optimizers:
        part.init_state_fn = lambda *_: None
        if part.optimizer is None or not momentum:
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                # from zero, the first step is the gradient, as torch makes it
                part.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def zero_gradients(ddp: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Clear Megatron's gradient buffers and the optimizer's references to them."""
    for chunk in ddp:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def has_finite_gradients(ddp: Sequence[DistributedDataParallel]) -> bool:
    """Whether every gradient held by this rank is finite; one pass over the buffers."""
    chunks: Sequence[Any] = ddp  # ``buffers`` is Megatron's own, not torch's method of that name
    return all(bool(torch.isfinite(b.grad_data.sum())) for chunk in chunks for b in chunk.buffers)
