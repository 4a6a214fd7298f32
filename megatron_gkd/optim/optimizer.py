"""Megatron's DDP wrapper, optimizer and learning-rate schedule, and operations on the gradient buffers.

Megatron's DDP sums a parameter's gradients over the micro-batches in ``parameter.main_grad``, in fp32. Checked with
megatron-core 0.16.1.

Shapes: V = vocabulary entries held by this rank, H = hidden size.
"""

from collections.abc import Callable, Collection, Sequence
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
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from torch import Tensor

from megatron_gkd.config.optim import OptimConfig
from megatron_gkd.parallel.groups import ModelGroups

_MEGATRON_STYLES = {"inverse_square_root": "inverse-square-root", "wsd": "WSD"}


def wrap_ddp(
    chunks: Sequence[GPTModel], groups: ModelGroups, config: OptimConfig
) -> list[DistributedDataParallel]:
    """Wrap each chunk of this rank's model in Megatron's DDP, with fp32 gradients."""
    # With calculate_per_token_loss DDP sums over ranks instead of averaging, and finalize_model_grads divides by the
    # global number of loss tokens. Megatron's own NaN check raises on one rank while the others enter the next
    # collective, so it is off: all ranks agree on has_finite_gradients before the update.
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=False,
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_grad_reduce=config.overlap_grad_reduce,
    )
    config_of_model: Any = chunks[0].config  # shared by all chunks
    ddp = [
        # as in Megatron's training.py: no buckets from the second chunk on, since their all-reduce overlaps with the
        # backward pass of the earlier chunks anyway
        DistributedDataParallel(
            config_of_model, ddp_config, chunk, disable_bucketing=i > 0, pg_collection=groups.pg
        )
        for i, chunk in enumerate(chunks)
    ]
    config_of_model.finalize_model_grads_func = finalize_model_grads
    if config.overlap_grad_reduce:
        # the all-reduce starts in the last micro-batch instead of in each
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
    """Build Megatron's optimizer, with fp32 main parameters for a bf16 model. Collective over all ranks.

    Args:
        ddp: The wrapped model; parameters with ``requires_grad=False`` get no state.
        groups: Its layout and process groups.
        config: Optimizer settings.
        dtype: Parameter dtype.
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
    # contains all_gather_object over the world group (optimizer/__init__.py:181), so no rank may skip the call
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
    """Allocate SGD's momentum, so that a checkpoint can be loaded into it."""
    # Megatron 0.16.1 has an init_state_fn for Adam only; for SGD it is None, and loading calls it
    inner: Any = optimizer
    for part in inner.chained_optimizers:
        part.init_state_fn = lambda *_: None
        if part.optimizer is None or not momentum:
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                # with a zero buffer the first update is the gradient, as in torch without a buffer
                part.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


class LearningRateSchedule:
    """Linear warmup, then decay to ``min_lr`` by ``optim.decay_style``, with Megatron's scheduler.

    The rate depends on the iteration alone, so a checkpoint needs no schedule state. The first warmup iteration runs at
    ``lr / warmup``, and ``min_lr`` would be reached one iteration after the last, so no iteration has a rate of zero.
    """

    def __init__(self, optimizer: MegatronOptimizer, config: OptimConfig, train_iters: int):
        self._optimizer, self._config = optimizer, config
        warmup = config.num_warmup_iters(train_iters)
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=warmup,
            lr_decay_steps=max(train_iters, warmup) + 1,
            lr_decay_style=_MEGATRON_STYLES.get(config.decay_style, config.decay_style),
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=train_iters,
            wd_incr_style="constant",
            wsd_decay_steps=config.num_wsd_decay_iters(train_iters) + 1,
            lr_wsd_decay_style=config.wsd_decay_style,
        )

    def set_iteration(self, iteration: int) -> float:
        """Set the learning rate for the 0-based ``iteration`` and return it."""
        for group in self._optimizer.param_groups:
            # Megatron's scheduler prefers these entries of the group, and a loaded checkpoint has overwritten them
            # with the values of the run that saved it (optimizer_param_scheduler.py:223, 0.16.1)
            group["max_lr"], group["min_lr"] = self._config.lr, self._config.min_lr
        self._scheduler.num_steps = 0  # step() adds its argument to the count
        self._scheduler.step(iteration + 1)
        return self._optimizer.param_groups[0]["lr"]


def zero_gradients(ddp: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Zero DDP's gradient buffers and the optimizer's gradients."""
    for chunk in ddp:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def has_finite_gradients(ddp: Sequence[DistributedDataParallel]) -> bool:
    """Whether every gradient held by this rank is finite; one pass over the buffers."""
    chunks: Sequence[Any] = ddp  # for pyright ``buffers`` is the method of torch.nn.Module
    # a sum is NaN or infinite if any element is, and needs no mask of the buffer's size
    return all(bool(torch.isfinite(b.grad_data.sum())) for chunk in chunks for b in chunk.buffers)


def main_grad_adder(parameter: Tensor) -> Callable[[Tensor, Tensor], Tensor | None] | None:
    """Return ``add(grad_VH, factor)``, which accumulates a gradient in ``main_grad``; ``None`` without DDP.

    ``add`` overwrites ``grad_VH`` (contiguous, fp32) and returns the value for autograd in place of the gradient.
    """
    # Saves the copy of [V, H] that autograd would make and DDP's hook would add, and in bf16 its rounding. The hook runs
    # after each backward pass (distributed_data_parallel.py:437, 0.16.1): with grad_added_to_main_grad it drops
    # parameter.grad, unless zero_out_wgrad marks a weight that another layer of this stage uses, too (tied embedding).
    megatron: Any = parameter
    main_grad_VH = getattr(megatron, "main_grad", None)
    if main_grad_VH is None or main_grad_VH.dtype != torch.float32 or parameter.element_size() > 4:
        return None

    def add(grad_VH: Tensor, factor: Tensor) -> Tensor | None:
        megatron.main_grad.addcmul_(grad_VH, factor)
        if getattr(megatron, "zero_out_wgrad", False):
            # the embedding's gradient follows in the same backward pass, and the hook runs once, with it
            return None
        megatron.grad_added_to_main_grad = True
        # with overlap_grad_reduce the hook asserts that there is a gradient; it is dropped, so any memory will do
        return grad_VH.flatten().view(parameter.dtype)[: parameter.numel()].view_as(parameter)

    return add
