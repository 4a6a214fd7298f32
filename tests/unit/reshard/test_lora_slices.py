"""Adapters under PEFT's names: each matrix once and whole, and q, k and v (gate and up) with one A."""

import math

import pytest

from megatron_gkd.config import load_hf_shapes
from megatron_gkd.parallel.groups import Layout
from megatron_gkd.reshard.layout import WeightLayout, hf_tensors, rank_slices
from megatron_gkd.reshard.lora import adapter_slices, peft_modules, peft_tensors
from tests.unit.config.conftest import write_hf_config

ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
RANK = 3


def weights_of(folder, tp: int, pp: int) -> WeightLayout:
    return WeightLayout(load_hf_shapes(write_hf_config(folder)), Layout(tp, pp, tp * pp), 1004)


def parameters_of(weights, pp_rank: int, targets) -> list[str]:
    base = {piece.parameter for piece in rank_slices(weights, tp_rank=0, pp_rank=pp_rank)}
    layers = [name.removesuffix(".weight") for name in base if name.split(".")[-2] in targets]
    return [*base, *(f"{layer}.adapter.lora_{matrix}" for layer in layers for matrix in "AB")]


def slices_of(weights, targets=ALL):
    return [
        [*adapter_slices(weights, RANK, tp_rank=t, pp_rank=p, parameters=parameters_of(weights, p, targets))]
        for p in range(weights.layout.pp_size)
        for t in range(weights.layout.tp_size)
    ]


def test_names_and_shapes_are_those_that_peft_writes(tmp_path):
    tensors = peft_tensors(weights_of(tmp_path, 1, 1), RANK, ("linear_qkv", "linear_fc2"))
    stem = "base_model.model.model.layers.3."
    assert {name: shape for name, shape in tensors.items() if name.startswith(stem)} == {
        stem + "self_attn.q_proj.lora_A.weight": (3, 64),
        stem + "self_attn.q_proj.lora_B.weight": (64, 3),
        stem + "self_attn.k_proj.lora_A.weight": (3, 64),
        stem + "self_attn.k_proj.lora_B.weight": (32, 3),
        stem + "self_attn.v_proj.lora_A.weight": (3, 64),
        stem + "self_attn.v_proj.lora_B.weight": (32, 3),
        stem + "mlp.down_proj.lora_A.weight": (3, 160),
        stem + "mlp.down_proj.lora_B.weight": (64, 3),
    }


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_all_ranks_together_hold_every_number(tmp_path, tp: int, pp: int):
    weights = weights_of(tmp_path, tp, pp)
    tensors = peft_tensors(weights, RANK, ALL)
    blocks = {piece.tensor: set() for rank in slices_of(weights) for piece in rank}
    for rank in slices_of(weights):
        assert len({(piece.tensor, piece.full) for piece in rank}) == len(rank), "a slice twice on one rank"
        for piece in rank:
            assert [b - a for a, b in piece.local] == [b - a for a, b in piece.full]
            blocks[piece.tensor].add(piece.full)
    assert blocks.keys() == tensors.keys()
    for name, shape in tensors.items():
        sizes = [math.prod(stop - start for start, stop in block) for block in blocks[name]]
        assert sum(sizes) == math.prod(shape), name


def test_a_fused_layer_gives_its_a_to_each_part(tmp_path):
    (rank,) = slices_of(weights_of(tmp_path, 1, 1), ("linear_fc1",))
    of_a = [piece for piece in rank if piece.parameter == "decoder.layers.0.mlp.linear_fc1.adapter.lora_A"]
    assert {piece.tensor.split(".")[-3] for piece in of_a} == {"gate_proj", "up_proj"}
    assert len({piece.local for piece in of_a}) == 1


def test_only_chosen_layers_are_named(tmp_path):
    weights = weights_of(tmp_path, 2, 1)
    assert peft_modules(weights, ("linear_proj", "linear_fc1")) == ["gate_proj", "o_proj", "up_proj"]
    names = {piece.tensor.split(".")[-3] for rank in slices_of(weights, ("linear_proj",)) for piece in rank}
    assert names == {"o_proj"}
    assert set(hf_tensors(weights.shapes)) >= {
        name.removeprefix("base_model.model.").rsplit(".", 2)[0] + ".weight"
        for name in peft_tensors(weights, RANK, ALL)
    }
