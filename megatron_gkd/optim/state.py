"""Save and load the optimizer state in any layout, with workarounds for torch's Adam.

The state is saved per parameter in the parameter's global shape, so that any tensor-, pipeline- and data-parallel layout
can load it, with the plain and with the distributed optimizer. All workarounds were checked with megatron-core 0.16.1 and
are needed without Apex and Transformer Engine, where Megatron falls back to torch.optim.
"""

from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_gkd.parallel.collectives import reduce_values

# The default, "fully_sharded_model_space", needs ShardedTensor.flattened_range, which dist_checkpointing no longer
# supports in 0.16.1. Saving and loading must use the same type.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_FP32_WEIGHTS = "fp32_from_fp16_params"


def sharded_optimizer_state(
    optimizer: MegatronOptimizer,
    sharded_weights: dict[str, Any],
    *,
    is_loading: bool = False,
    device: torch.device,
) -> dict[str, Any]:
    """Return the sharded state dict to save, or to load into. Collective.

    Args:
        optimizer: Megatron's optimizer.
        sharded_weights: ``sharded_state_dict`` of the model.
        is_loading: The result is for loading.
        device: Device for collectives.
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
    """Load moments, step and fp32 weights; learning rate, weight decay and other settings are kept.

    Args:
        optimizer: Megatron's optimizer.
        state: ``sharded_optimizer_state(..., is_loading=True)`` after dist_checkpointing has loaded it.
    """
    # load_state_dict overwrites the parameter groups, whose settings come from this run's configuration
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
    """The optimizer inside Megatron's ChainedOptimizer, which has one element for a dense model."""
    if not isinstance(optimizer, ChainedOptimizer):
        return optimizer
    (only,) = optimizer.chained_optimizers
    return only


def _settings_of(group: dict[str, Any]) -> dict[str, Any]:
    # Transformer Engine's and Apex's Adam keep their step, which is state, in the group
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def _make_missing_state(adam: torch.optim.Optimizer | None) -> None:
    """Allocate zero moments and step for parameters without state."""
    # torch allocates them in the first step, and DistributedOptimizer.state_dict asserts that they exist
    # (distrib_optimizer.py:642). They are missing in a new run and in one whose updates were all skipped.
    if not isinstance(adam, torch.optim.Adam):  # the base class of AdamW
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
    """Replace the list of fp32 weight groups by a dictionary without the empty groups."""
    # dist_checkpointing drops empty list elements and merges lists of ranks by position. A rank whose stage is frozen has
    # an empty group, its positions shift, and loading fails or silently fills another group.
    if _FP32_WEIGHTS in state:
        state[_FP32_WEIGHTS] = {i: group for i, group in enumerate(state[_FP32_WEIGHTS]) if group}


def _list_groups(state: dict[str, Any], num_groups: int) -> None:
    """Inverse of ``_number_groups``."""
    if _FP32_WEIGHTS in state:
        state[_FP32_WEIGHTS] = [state[_FP32_WEIGHTS].get(i, []) for i in range(num_groups)]


def _share_step(state: dict[str, Any], device: torch.device) -> None:
    """Add the number of updates to the state of every rank. Collective over all ranks."""
    # dist_checkpointing saves unsharded values from rank 0 only, which has no step if its pipeline stage is frozen
    own = state.get("optimizer", state).get("state", {})  # nested in "optimizer" by Float16Optimizer
    step = reduce_values([float(own.get("common_step", 0))], ["max"], device=device)[0]
    if step and "common_step" not in own:
        own["common_step"] = torch.tensor(step)


def _add_step_zero(adam: torch.optim.Optimizer | None, state: dict[str, Any]) -> None:
    """Add a step of 0 to a loaded state without one."""
    # Megatron omits a step of 0 in the state that it saves, and torch's Adam refuses to load a state without a step
    if isinstance(adam, torch.optim.Adam):
        # nested in "optimizer" by Float16Optimizer
        state.get("optimizer", state)["state"].setdefault("common_step", torch.tensor(0.0))


def _count_padding(optimizer: DistributedOptimizer) -> None:
    """Make Megatron gather its buffers including their padding."""
    # It concatenates the buckets without padding but slices parameters by their padded positions
    # (distrib_optimizer.py:1113, 0.16.1): from the second bucket on it saves moments of other parameters. A tied
    # embedding under pipeline parallelism has a bucket of its own.
    for buffer in optimizer.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def _load_distributed(optimizer: DistributedOptimizer, state: dict[str, Any]) -> None:
    state = dict(state)
    moments = state.pop("param_state")
    optimizer.load_state_dict(state)  # settings and the step
    of_parameter = optimizer.optimizer.state
    # Megatron copies every entry of a parameter's state, but "step" is not stored per parameter (KeyError at :940)
    steps = {parameter: entry.pop("step", None) for parameter, entry in of_parameter.items()}
    optimizer.load_parameter_state_from_fully_reshardable(moments)
    for parameter, step in steps.items():
        if step is not None:
            # load_state_dict assigns one step tensor to all parameters (:825), and each would increment it: after one
            # update a resumed run counted 17 instead of 5
            of_parameter[parameter]["step"] = step.clone()
