"""LoRA adapters as slices of PEFT's tensors, analogous to ``reshard.layout``."""

from collections.abc import Iterable, Sequence

from megatron_gkd.models.patterns import all_weights
from megatron_gkd.reshard.layout import Slice, WeightLayout, hf_tensors, rank_slices

_PREFIX = "base_model.model."  # of all tensors in PEFT's adapter_model.safetensors


def peft_tensors(weights: WeightLayout, rank: int, targets: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the adapter by name."""
    shapes = hf_tensors(weights.shapes)
    tensors: dict[str, tuple[int, ...]] = {}
    for weight in all_weights(weights.shapes):
        if _target(weight.megatron[0]) in targets:
            for name in weight.hf:
                num_outputs, num_inputs = shapes[name]
                tensors[_peft_name(name, "A")] = (rank, num_inputs)
                tensors[_peft_name(name, "B")] = (num_outputs, rank)
    return tensors


def adapter_slices(
    weights: WeightLayout, rank: int, *, tp_rank: int, pp_rank: int, parameters: Iterable[str]
) -> list[Slice]:
    """Return the slices of a rank's adapters, including those replicated over tensor-parallel ranks.

    Args:
        weights: The model and its layout.
        rank: Rank of the adapters.
        tp_rank: Tensor-parallel rank.
        pp_rank: Pipeline-parallel rank.
        parameters: Names of the rank's parameters, including those of its adapters.
    """
    present = set(parameters)
    # An ordered set: fused layers have one A for q, k and v (gate and up), of which PEFT gets a copy each, while the
    # slices of one tensor repeat it per query group.
    slices: dict[Slice, None] = {}
    for piece in rank_slices(weights, tp_rank=tp_rank, pp_rank=pp_rank, parameters=present):
        layer = piece.parameter.removesuffix(".weight")
        lora_a, lora_b = f"{layer}.adapter.lora_A", f"{layer}.adapter.lora_B"
        if lora_a in present:
            # A has the columns of the weight, B its rows.
            whole = (0, rank)
            columns, rows = (piece.local[1], piece.full[1]), (piece.local[0], piece.full[0])
            slices[Slice(lora_a, (whole, columns[0]), _peft_name(piece.tensor, "A"), (whole, columns[1]))] = (
                None
            )
            slices[Slice(lora_b, (rows[0], whole), _peft_name(piece.tensor, "B"), (rows[1], whole))] = None
    return sorted(slices, key=lambda piece: piece.parameter)


def peft_modules(weights: WeightLayout, targets: Sequence[str]) -> list[str]:
    """Return the module names with an adapter, for PEFT's ``target_modules``."""
    tensors = (n for w in all_weights(weights.shapes) if _target(w.megatron[0]) in targets for n in w.hf)
    return sorted({name.split(".")[-2] for name in tensors if name.endswith(".weight")})


def _target(parameter: str) -> str:
    return parameter.split(".")[-2] if parameter.endswith(".weight") else ""


def _peft_name(tensor: str, matrix: str) -> str:
    return f"{_PREFIX}{tensor.removesuffix('.weight')}.lora_{matrix}.weight"
