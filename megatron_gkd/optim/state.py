"""The optimizer's state to and from a checkpoint, in whatever layout; repairs what Megatron gets wrong with torch's Adam.

The state is saved parameter by parameter in the model's own shape, so that any tensor-, pipeline- and data-parallel layout
can read it, with the plain and with the distributed optimizer. Checked with megatron-core 0.16.1.
"""

from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_gkd.parallel.collectives import reduce_values

# Megatron's default for the distributed optimizer is a format that its own checkpoints no longer support
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_FP32_WEIGHTS = "fp32_from_fp16_params"


def sharded_optimizer_state(
    optimizer: MegatronOptimizer,
    sharded_weights: dict[str, Any],
    *,
    is_loading: bool = False,
    device: torch.device,
) -> dict[str, Any]:
    """The state as dist_checkpointing saves it, or with ``is_loading`` what it is to fill. Collective.

    Args:
        optimizer: Megatron's optimizer.
        sharded_weights: ``sharded_state_dict`` of the model.
        is_loading: The result is for loading.
        device: Where the collective back end wants its tensors.
    """
    part = _megatron_optimizer(optimizer)
    _make_missing_state(part.optimizer)
    if isinstance(part, DistributedOptimizer):
        _count_padding(part)
    state = optimizer.sharded_state_dict(sharded_weights, is_loading=is_loading, metadata=_METADATA)
    _number_groups(state)
    _share_step(state, device)
    return state


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Take over moments, step and fp32 weights; learning rate, decay and all other settings stay this run's own.

    Args:
        optimizer: Megatron's optimizer.
        state: What dist_checkpointing made of ``sharded_optimizer_state(..., is_loading=True)``.
    """
    settings = [_settings_of(group) for group in optimizer.param_groups]
    part = _megatron_optimizer(optimizer)
    if isinstance(part, DistributedOptimizer):
        _load_distributed(part, state)
    else:
        _add_step_zero(part.optimizer, state)
        _list_groups(state, len(optimizer.param_groups))
        optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _megatron_optimizer(optimizer: MegatronOptimizer) -> Any:
    """The one optimizer of a dense model; Megatron hands it over in a chain of length one."""
    if not isinstance(optimizer, ChainedOptimizer):
        return optimizer
    (only,) = optimizer.chained_optimizers
    return only


def _settings_of(group: dict[str, Any]) -> dict[str, Any]:
    # "step" is state: Transformer Engine's and Apex's Adam keep it there
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def _make_missing_state(adam: torch.optim.Optimizer | None) -> None:
    """The state before the first step, as zeros; torch makes it only in that step, and Megatron asserts that it exists.

    It is missing in a run that has just started, and in one whose updates were all skipped.
    """
    if not isinstance(adam, torch.optim.Adam):  # the base of AdamW
        return
    for group in adam.param_groups:
        for parameter in group["params"]:
            state = adam.state[parameter]
            if "step" not in state:
                state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in state:
                    state[name] = torch.zeros_like(parameter.data)


def _number_groups(state: dict[str, Any]) -> None:
    """Name the groups of fp32 weights by their numbers, without the empty ones.

    dist_checkpointing drops and merges elements of lists by position, and where a rank trains nothing of a group (its stage is
    frozen) the positions of ranks differ: loading fails, or fills another group.
    """
    if _FP32_WEIGHTS in state:
        state[_FP32_WEIGHTS] = {i: group for i, group in enumerate(state[_FP32_WEIGHTS]) if group}


def _list_groups(state: dict[str, Any], num_groups: int) -> None:
    """Inverse of ``_number_groups``."""
    if _FP32_WEIGHTS in state:
        state[_FP32_WEIGHTS] = [state[_FP32_WEIGHTS].get(i, []) for i in range(num_groups)]


def _share_step(state: dict[str, Any], device: torch.device) -> None:
    """Put the number of updates, which Adam needs, into the sharded state of every rank. Collective over all ranks.

    A checkpoint keeps what rank 0 says, and rank 0 has none where its whole pipeline stage is frozen.
    """
    own = state.get("optimizer", state).get("state", {})  # one level deeper with bf16
    step = reduce_values([float(own.get("common_step", 0))], ["max"], device=device)[0]
    if step and "common_step" not in own:
        own["common_step"] = torch.tensor(step)


def _add_step_zero(adam: torch.optim.Optimizer | None, state: dict[str, Any]) -> None:
    """Megatron leaves a step of 0 out when it saves, and torch's Adam refuses a state without."""
    if isinstance(adam, torch.optim.Adam):
        # one level deeper beside fp32 main weights
        state.get("optimizer", state)["state"].setdefault("common_step", torch.tensor(0.0))


def _count_padding(optimizer: DistributedOptimizer) -> None:
    """Let Megatron collect its buffers with their padding.

    It collects them without, but then cuts the parameters out by their positions with it: from the second bucket on
    (one is made for a tied embedding under pipeline parallelism) it would save moments of other parameters.
    """
    for buffer in optimizer.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def _load_distributed(optimizer: DistributedOptimizer, state: dict[str, Any]) -> None:
    state = dict(state)
    moments = state.pop("param_state")
    optimizer.load_state_dict(state)  # settings and the step
    of_parameter = optimizer.optimizer.state
    # Megatron copies every entry that the state has, and "step" is not stored by parameter: hide it meanwhile
    steps = {parameter: entry.pop("step", None) for parameter, entry in of_parameter.items()}
    optimizer.load_parameter_state_from_fully_reshardable(moments)
    for parameter, step in steps.items():
        if step is not None:
            # Megatron gives all parameters the same tensor, which each of them would then count up
            of_parameter[parameter]["step"] = step.clone()
