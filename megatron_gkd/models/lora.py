"""Low-rank adapters on Megatron's linear layers: W x + scale B A x, with W frozen.

A layer keeps its class and its parameters' names; it gets a submodule ``adapter``, and its forward adds what that returns.
Only r numbers per token cross between tensor-parallel ranks, and merging needs no communication: A or B is whole where
the layer's other side is split.

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

from megatron_gkd.models.chunks import LocalModel, chunks_of
from megatron_gkd.parallel.groups import ModelGroups

_COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")


@dataclass(frozen=True)
class LoraSpec:
    """What adapters a model has.

    Attributes:
        rank: Rows of A and columns of B.
        alpha: The scale is alpha / rank.
        dropout: Probability that an input of A is left out in training.
        targets: Names of the linear layers that have one.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "targets": list(self.targets)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "LoraSpec":
        """Inverse of ``to_json``."""
        return cls(**{**value, "targets": tuple(value["targets"])})


class Adapter(torch.nn.Module):
    """scale B A x beside one linear layer.

    Column-parallel layers have all of A and their rows of B on every rank, row-parallel ones their columns of A and all
    of B.

    Args:
        target: Name of the layer.
        weight_OI: This rank's part of its weight.
        spec: Rank, alpha and dropout.
        config: The model's configuration.
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
        # its gradient is that of this rank's part of the sequence; finalize_model_grads adds them up
        marked.sequence_parallel = self._sequence_parallel

    def forward(self, x_SBI: Tensor) -> Tensor:
        """[S, B, O] to be added to the layer's output, split as that is."""
        # the default generator is in the same state on all tensor-parallel ranks, so they drop the same inputs
        hidden_SBR = functional.linear(functional.dropout(x_SBI, self.dropout, self.training), self.lora_A)
        return functional.linear(self._cross(hidden_SBR), self.lora_B) * self.scale

    def delta(self) -> Tensor:
        """[O, I] scale B A of this rank's part of the weight, fp32 (fp64 for fp64 adapters)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.lora_B.to(dtype) @ self.lora_A.to(dtype) * self.scale

    def sharded_state_dict(self, prefix: str = "", sharded_offsets=(), metadata=None) -> dict[str, Any]:
        """A and B as parts of the whole model's, for dist_checkpointing."""
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
            name = f"{prefix}lora_B"
            state[name] = apply_swiglu_sharded_factory(state[name], sharded_offsets)
        return state

    def _cross(self, hidden_SBR: Tensor) -> Tensor:
        """From the split of A x to that of its use by B."""
        region = {
            (True, False): tensor_parallel.copy_to_tensor_model_parallel_region,
            (True, True): tensor_parallel.gather_from_sequence_parallel_region,
            (False, False): tensor_parallel.reduce_from_tensor_model_parallel_region,
            (False, True): tensor_parallel.reduce_scatter_to_sequence_parallel_region,
        }[self.splits_outputs, self._sequence_parallel]
        return region(hidden_SBR, group=self._group)


def attach_adapters(model: LocalModel, spec: LoraSpec, groups: ModelGroups) -> None:
    """Put an adapter beside every target; A and B are zero, and the model computes what it did before."""
    for _, target, layer in _layers(model, spec.targets):
        layer.add_module(
            "adapter", Adapter(target, layer.weight, spec, config=model.config, group=groups.pg.tp)
        )
        _call_adapter(layer)
    marked: Any = model
    marked.lora = spec


def attached_spec(model: LocalModel) -> LoraSpec | None:
    """What adapters the model has, if any."""
    return getattr(model, "lora", None)


def start_training_adapters(model: LocalModel, groups: ModelGroups, *, seed: int) -> None:
    """Freeze all weights but the adapters', and draw every A; B stays zero.

    A is uniform in +-1 / sqrt(inputs), as PEFT draws it, and depends on seed, layer and target alone, not on the layout.
    """
    spec = attached_spec(model)
    assert spec is not None  # attach_adapters comes first
    model.requires_grad_(False)
    for number, target, layer in _layers(model, spec.targets):
        layer.adapter.requires_grad_(True)
        split = 1 if layer.adapter.splits_outputs else groups.layout.tp_size
        full_RI = _draw_uniform(spec.rank, layer.weight.shape[1] * split, f"{seed}/{number}/{target}")
        layer.adapter.lora_A.data.copy_(full_RI.chunk(split, dim=1)[groups.tp_rank % split])


def merged_parameters(model: LocalModel) -> Mapping[str, Tensor]:
    """The model's weights by name, each with what its adapter adds; made when asked for, always the present ones."""
    return _MergedParameters(model)


def merge_adapters(model: LocalModel) -> None:
    """Add the adapters to the weights and remove them."""
    merged, spec = merged_parameters(model), attached_spec(model)
    assert spec is not None  # there are adapters to merge
    parameters = dict(model.named_parameters())
    for name, weight in merged.items():
        parameters[name].data.copy_(weight)
    for _, _, layer in _layers(model, spec.targets):
        del layer.adapter, layer.forward, layer.sharded_state_dict
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
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _layers(model: LocalModel, targets: Sequence[str]) -> Iterator[tuple[int, str, Any]]:
    """(number in the whole model, target, linear layer) of this rank's targets."""
    blocks: list[Any] = [block for chunk in chunks_of(model) for block in chunk.decoder.layers]
    for block in blocks:
        for target in targets:
            parent = block.mlp if target in ("linear_fc1", "linear_fc2") else block.self_attention
            yield block.layer_number, target, getattr(parent, target)


def _call_adapter(layer: Any) -> None:
    """Let the layer's forward and its sharded state dict take the adapter along."""
    forward, sharded_state_dict = layer.forward, layer.sharded_state_dict

    def forward_with_adapter(self, input_, *args, **kwargs):
        output, bias = forward(input_, *args, **kwargs)
        return output + self.adapter(_linear_input(self, input_)), bias

    def sharded_with_adapter(self, prefix="", sharded_offsets=(), metadata=None):
        # the layer's own method lists the adapter too, as if it were not split
        state = sharded_state_dict(prefix, sharded_offsets, metadata)
        return {**state, **self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)}

    layer.forward = types.MethodType(forward_with_adapter, layer)
    layer.sharded_state_dict = types.MethodType(sharded_with_adapter, layer)


def _linear_input(layer: Any, input_: Tensor) -> Tensor:
    """What the matrix is multiplied with: Transformer Engine keeps the norm before it in the same layer."""
    norm_weight = getattr(layer, "layer_norm_weight", None)
    if norm_weight is None:
        return input_
    return functional.rms_norm(input_, norm_weight.shape, norm_weight, layer.eps)


def _draw_uniform(rows: int, columns: int, name: str) -> Tensor:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    bound = columns**-0.5
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
