"""LoRA for Megatron's parallel linear layers: W x + scale B A x.

A layer keeps its class and its parameter names, gets a submodule ``adapter`` and adds the adapter's output to its own.
Column-parallel layers replicate A and split B by rows; row-parallel layers split A by columns and replicate B. So only R
numbers per token are communicated between tensor-parallel ranks, and merging needs no communication.

Shapes: S = positions, B = sequences, I = inputs and O = outputs of the layer on this rank, R = rank of the adapter.
"""

import hashlib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional

from megatron_gkd.models.gpt import LocalModel, chunks_of
from megatron_gkd.parallel.groups import ModelGroups

_COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")


@dataclass(frozen=True)
class LoraSpec:
    """Rank, scale, dropout and target layers of a model's adapters.

    Attributes:
        rank: Rows of A and columns of B.
        alpha: The scale is alpha / rank.
        dropout: Dropout probability of the inputs of A in training.
        targets: Names of the linear layers with an adapter.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, for a checkpoint's manifest."""
        return {**asdict(self), "targets": list(self.targets)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "LoraSpec":
        """Inverse of ``to_json``."""
        return cls(**{**value, "targets": tuple(value["targets"])})


class Adapter(torch.nn.Module):
    """The adapter of one linear layer: scale B A x.

    Args:
        target: Name of the layer.
        weight_OI: This rank's shard of the layer's weight.
        spec: Rank, alpha and dropout.
        config: The model's ``TransformerConfig``.
        group: Tensor-parallel group.
    """

    def __init__(self, target: str, weight_OI: Tensor, spec: LoraSpec, *, config: Any, group: Any):
        super().__init__()
        num_outputs, num_inputs = weight_OI.shape
        self.lora_A = torch.nn.Parameter(weight_OI.new_zeros(spec.rank, num_inputs))
        self.lora_B = torch.nn.Parameter(weight_OI.new_zeros(num_outputs, spec.rank))
        self.scale, self.dropout = spec.alpha / spec.rank, spec.dropout
        self.splits_outputs = target in _COLUMN_PARALLEL
        self._group, self._sequence_parallel = group, config.sequence_parallel
        self._holds_gate_and_up = target == "linear_fc1" and config.gated_linear_unit
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        split, dim, whole = (
            (self.lora_B, 0, self.lora_A) if self.splits_outputs else (self.lora_A, 1, self.lora_B)
        )
        tensor_parallel.set_tensor_model_parallel_attributes(split, True, dim, 1)
        marked: Any = whole
        # with sequence parallelism each rank has the gradient of its part of the sequence; finalize_model_grads sums
        # the gradients of parameters with this attribute over the tensor-parallel group
        marked.sequence_parallel = self._sequence_parallel

    def forward(self, x_SBI: Tensor) -> Tensor:
        """Return [S, B, O] to add to the layer's output, split in the same way."""
        # the default generator has the same state on all tensor-parallel ranks, so they drop the same inputs
        hidden_SBR = functional.linear(functional.dropout(x_SBI, self.dropout, self.training), self.lora_A)
        return functional.linear(self._cross(hidden_SBR), self.lora_B) * self.scale

    def delta(self) -> Tensor:
        """Return [O, I] scale B A for this rank's shard, in fp32 or fp64."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.lora_B.to(dtype) @ self.lora_A.to(dtype) * self.scale

    def sharded_state_dict(self, prefix: str = "", sharded_offsets=(), metadata=None) -> dict[str, Any]:
        """Return A and B as sharded tensors for dist_checkpointing."""
        axes = {"lora_B": 0} if self.splits_outputs else {"lora_A": 1}
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self._group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        if self._holds_gate_and_up:
            # a rank's rows are cat(gate, up) of its shard, so they are two intervals of the full tensor
            name = f"{prefix}lora_B"
            state[name] = apply_swiglu_sharded_factory(state[name], sharded_offsets)
        return state

    def _cross(self, hidden_SBR: Tensor) -> Tensor:
        """Communicate A x from the layer's input split to the split of B."""
        region = {
            (True, False): tensor_parallel.copy_to_tensor_model_parallel_region,
            (True, True): tensor_parallel.gather_from_sequence_parallel_region,
            (False, False): tensor_parallel.reduce_from_tensor_model_parallel_region,
            (False, True): tensor_parallel.reduce_scatter_to_sequence_parallel_region,
        }[self.splits_outputs, self._sequence_parallel]
        return region(hidden_SBR, group=self._group)


def attach_adapters(model: LocalModel, spec: LoraSpec, groups: ModelGroups) -> None:
    """Add a zero adapter to every target layer; the model's outputs do not change."""
    for _, target, layer in _layers(model, spec.targets):
        layer.add_module(
            "adapter", Adapter(target, layer.weight, spec, config=model.config, group=groups.pg.tp)
        )
        _call_adapter(layer)
    marked: Any = model
    marked.lora = spec


def attached_spec(model: LocalModel) -> LoraSpec | None:
    """The spec of the model's adapters, ``None`` without adapters."""
    return getattr(model, "lora", None)


def start_training_adapters(model: LocalModel, groups: ModelGroups, *, seed: int) -> None:
    """Freeze all weights except the adapters and initialize every A; B stays zero.

    A is uniform in +-1 / sqrt(inputs), as in PEFT. It depends on seed, layer and target only, not on the layout.
    """
    spec = attached_spec(model)
    assert spec is not None  # attach_adapters comes first
    model.requires_grad_(False)
    for number, target, layer in _layers(model, spec.targets):
        layer.adapter.requires_grad_(True)
        split = 1 if layer.adapter.splits_outputs else groups.layout.tp_size
        # every rank draws the full A and takes its columns, which makes the values independent of the layout
        full_RI = _draw_uniform(spec.rank, layer.weight.shape[1] * split, f"{seed}/{number}/{target}")
        layer.adapter.lora_A.data.copy_(full_RI.chunk(split, dim=1)[groups.tp_rank % split])


def merged_parameters(model: LocalModel) -> Mapping[str, Tensor]:
    """Lazy view of the model's weights by name, each with its adapter's current delta added."""
    return _MergedParameters(model)


def merge_adapters(model: LocalModel) -> None:
    """Add the adapters' deltas to the weights and remove the adapters."""
    merged, spec = merged_parameters(model), attached_spec(model)
    assert spec is not None  # the caller has checked attached_spec
    parameters = dict(model.named_parameters())
    for name, weight in merged.items():
        parameters[name].data.copy_(weight)
    for _, _, layer in _layers(model, spec.targets):
        del layer.adapter, layer.forward, layer.sharded_state_dict  # the class's own methods show again
    del model.lora


class _MergedParameters(Mapping[str, Tensor]):
    def __init__(self, model: LocalModel):
        self._weights = {n: p for n, p in model.named_parameters() if ".adapter." not in n}
        self._adapters = {
            f"{name.removesuffix('.adapter')}.weight": module
            for name, module in model.named_modules()
            if isinstance(module, Adapter)
        }

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        if name not in self._adapters:
            return weight
        delta = self._adapters[name].delta()
        return (weight.to(delta.dtype) + delta).to(weight.dtype)  # rounded to bf16 once

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _layers(model: LocalModel, targets: Sequence[str]) -> Iterator[tuple[int, str, Any]]:
    """Yield (global layer number, target, linear layer) for this rank's target layers."""
    blocks: list[Any] = [block for chunk in chunks_of(model) for block in chunk.decoder.layers]
    for block in blocks:
        for target in targets:
            parent = block.mlp if target in ("linear_fc1", "linear_fc2") else block.self_attention
            yield block.layer_number, target, getattr(parent, target)


def _call_adapter(layer: Any) -> None:
    """Include the adapter in the layer's forward and in its sharded state dict."""
    forward, sharded_state_dict = layer.forward, layer.sharded_state_dict

    def forward_with_adapter(self, input_, *args, **kwargs):
        output, bias = forward(input_, *args, **kwargs)
        return output + self.adapter(_linear_input(self, input_)), bias

    def sharded_with_adapter(self, prefix="", sharded_offsets=(), metadata=None):
        # the layer's own method includes the adapter as if it were replicated; the update overwrites those entries
        state = sharded_state_dict(prefix, sharded_offsets, metadata)
        return {**state, **self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)}

    layer.forward = types.MethodType(forward_with_adapter, layer)
    layer.sharded_state_dict = types.MethodType(sharded_with_adapter, layer)


def _linear_input(layer: Any, input_: Tensor) -> Tensor:
    """The input of the matrix product; Transformer Engine fuses the preceding norm into the layer."""
    norm_weight = getattr(layer, "layer_norm_weight", None)
    if norm_weight is None:
        return input_
    return functional.rms_norm(input_, norm_weight.shape, norm_weight, layer.eps)


def _draw_uniform(rows: int, columns: int, name: str) -> Tensor:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    bound = columns**-0.5
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
