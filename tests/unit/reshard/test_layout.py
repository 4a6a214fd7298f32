"""Slices cover every number exactly once, whatever the shapes and the layout. What the numbers are: test_conversion."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.config.hf_shapes import HfShapes
from megatron_gkd.parallel.groups import Layout
from megatron_gkd.reshard.layout import (
    WeightLayout,
    all_owned_slices,
    check_coverage,
    hf_tensors,
    owned_slices,
    rank_slices,
)


@st.composite
def weight_layouts(draw) -> WeightLayout:
    tp_size, pp_size = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 3]))
    vpp_size = draw(st.sampled_from([1, 2, 3])) if pp_size > 1 else 1
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    groups = tp_size * draw(st.integers(1, 2))
    shapes = HfShapes(
        model_type=family,
        vocab_size=draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 9)),
        num_layers=pp_size * vpp_size * draw(st.integers(1, 2)),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_query_groups=groups,
        head_dim=draw(st.integers(1, 5)),
        ffn_hidden_size=tp_size * draw(st.integers(1, 4)),
        tied=draw(st.booleans()),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
        eos_token_ids=(0,),
    )
    multiple = tp_size * draw(st.integers(1, 8))
    padded = math.ceil(shapes.vocab_size / multiple) * multiple
    return WeightLayout(shapes, Layout(tp_size, pp_size, tp_size * pp_size, vpp_size), padded)


def local_shapes(
    weights: WeightLayout, pp_rank: int, *, is_headless: bool = False
) -> dict[str, tuple[int, ...]]:
    """Parameters of a rank and their shapes, as Megatron's layers define them."""
    vpp = weights.layout.vpp_size
    shapes: dict[str, tuple[int, ...]] = {}
    for chunk in range(vpp):
        is_first = pp_rank == 0 and chunk == 0
        is_last = pp_rank == weights.layout.pp_size - 1 and chunk == vpp - 1
        prefix = f"{chunk}." if vpp > 1 else ""
        parameters = chunk_shapes(weights, is_first, is_last, is_headless)
        shapes |= {prefix + name: shape for name, shape in parameters.items()}
    return shapes


def chunk_shapes(
    weights: WeightLayout, is_first: bool, is_last: bool, is_headless: bool
) -> dict[str, tuple[int, ...]]:
    s, tp, pp = weights.shapes, weights.layout.tp_size, weights.layout.pp_size
    h, d, vocab = s.hidden_size, s.head_dim, weights.padded_vocab_size // tp
    qkv = (s.num_attention_heads + 2 * s.num_query_groups) * d // tp
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(s.num_layers // (pp * weights.layout.vpp_size)):
        layer = {
            "input_layernorm.weight": (h,),
            "self_attention.linear_qkv.weight": (qkv, h),
            "self_attention.linear_proj.weight": (h, s.num_attention_heads * d // tp),
            "pre_mlp_layernorm.weight": (h,),
            "mlp.linear_fc1.weight": (2 * s.ffn_hidden_size // tp, h),
            "mlp.linear_fc2.weight": (h, s.ffn_hidden_size // tp),
        }
        if s.qkv_bias:
            layer["self_attention.linear_qkv.bias"] = (qkv,)
        if s.qk_norm:
            layer |= {f"self_attention.{x}_layernorm.weight": (d,) for x in "qk"}
        shapes |= {f"decoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    if is_first:
        shapes["embedding.word_embeddings.weight"] = (vocab, h)
    if is_last:
        shapes["decoder.final_layernorm.weight"] = (h,)
        if not is_headless and not (s.tied and pp == 1):
            shapes["output_layer.weight"] = (vocab, h)
    return shapes


@settings(deadline=None, max_examples=60)
@given(weight_layouts(), st.booleans())
def test_a_rank_gets_every_number_of_its_parameters_exactly_once(weights: WeightLayout, is_headless: bool):
    layout, vocab = weights.layout, weights.shapes.vocab_size
    for tp_rank in range(layout.tp_size):
        for pp_rank in range(layout.pp_size):
            expected = local_shapes(weights, pp_rank, is_headless=is_headless)
            counts = {name: torch.zeros(shape, dtype=torch.int) for name, shape in expected.items()}
            for piece in rank_slices(weights, tp_rank=tp_rank, pp_rank=pp_rank, is_headless=is_headless):
                counts[piece.parameter][tuple(slice(*span) for span in piece.local)] += 1
                assert [b - a for a, b in piece.local] == [b - a for a, b in piece.full]
            for name, count in counts.items():
                real = len(count)
                if name.endswith(("embedding.word_embeddings.weight", "output_layer.weight")):
                    real = min(max(vocab - tp_rank * len(count), 0), len(count))
                assert (count[:real] == 1).all(), f"{name} has numbers without or with two sources"
                assert (count[real:] == 0).all(), f"{name}: padding rows are no weights"


@settings(deadline=None, max_examples=60)
@given(weight_layouts())
def test_all_ranks_together_write_every_tensor_exactly_once(weights: WeightLayout):
    counts = {name: torch.zeros(shape, dtype=torch.int) for name, shape in hf_tensors(weights.shapes).items()}
    for piece in all_owned_slices(weights):
        counts[piece.tensor][tuple(slice(*span) for span in piece.full)] += 1
    assert all((count == 1).all() for count in counts.values())
    check_coverage(weights.shapes, all_owned_slices(weights))  # agrees


@settings(deadline=None, max_examples=30)
@given(weight_layouts(), st.data())
def test_coverage_finds_a_missing_a_doubled_and_an_unknown_slice(weights: WeightLayout, data):
    pieces = all_owned_slices(weights)
    position = data.draw(st.integers(0, len(pieces) - 1))
    piece = pieces[position]
    with pytest.raises(ValueError, match=piece.tensor):
        check_coverage(weights.shapes, pieces[:position] + pieces[position + 1 :])
    with pytest.raises(ValueError, match=piece.tensor):
        check_coverage(weights.shapes, [*pieces, piece])
    unknown = dataclasses.replace(piece, tensor="model.layers.99.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"layers\.99.*not a tensor of this model"):
        check_coverage(weights.shapes, [*pieces, unknown])


def test_coverage_finds_a_slice_written_twice_in_place_of_another():
    """The number of written elements is right, so only the positions tell."""
    weights = _example("llama", tied=False, tp_size=2, pp_size=1)
    pieces = all_owned_slices(weights)
    halves = [p for p in pieces if p.tensor == "model.layers.0.mlp.down_proj.weight"]
    assert len(halves) == 2
    wrong = [halves[0] if p is halves[1] else p for p in pieces]
    with pytest.raises(ValueError, match=r"down_proj.*twice"):
        check_coverage(weights.shapes, wrong)


def test_names_of_transformer_engine_layers_are_used_where_the_rank_has_them():
    weights = _example("qwen2", tied=False, tp_size=1, pp_size=1)
    plain = {piece.parameter for piece in rank_slices(weights, tp_rank=0, pp_rank=0)}
    renamed = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    te = set(plain)
    for name in plain:
        for old, new in renamed.items():
            if name.endswith(old):
                te = te - {name} | {name.removesuffix(old) + new}
    assert te != plain
    assert {piece.parameter for piece in rank_slices(weights, tp_rank=0, pp_rank=0, parameters=te)} == te
    owned = owned_slices(weights, tp_rank=0, pp_rank=0, parameters=te)
    assert {piece.parameter for piece in owned} == te
    check_coverage(weights.shapes, owned)


def test_a_tied_last_stage_reads_its_copy_and_leaves_writing_to_the_first():
    weights = _example("llama", tied=True, tp_size=1, pp_size=2)
    read = {p.parameter: p.tensor for p in rank_slices(weights, tp_rank=0, pp_rank=1)}
    assert read["output_layer.weight"] == "model.embed_tokens.weight"
    assert "output_layer.weight" not in {p.parameter for p in owned_slices(weights, tp_rank=0, pp_rank=1)}


def test_chunks_of_a_stage_lie_a_round_of_all_stages_apart():
    shapes = dataclasses.replace(_example("llama", tied=True, tp_size=1, pp_size=2).shapes, num_layers=8)
    weights = WeightLayout(shapes, Layout(1, 2, 2, vpp_size=2), 10)
    norms = {
        p.parameter.removesuffix(".input_layernorm.weight"): p.tensor.split(".")[2]
        for p in rank_slices(weights, tp_rank=0, pp_rank=1)
        if p.parameter.endswith("input_layernorm.weight")
    }
    assert norms == {
        "0.decoder.layers.0": "2",
        "0.decoder.layers.1": "3",
        "1.decoder.layers.0": "6",
        "1.decoder.layers.1": "7",
    }
    names = {p.parameter for p in owned_slices(weights, tp_rank=0, pp_rank=1)}
    assert "1.decoder.final_layernorm.weight" in names
    assert "1.output_layer.weight" not in names  # tied: left to the first stage


def test_a_rank_that_holds_only_padding_still_knows_its_parameters():
    weights = dataclasses.replace(_example("llama", tied=False, tp_size=2, pp_size=1), padded_vocab_size=64)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        pieces = [p for p in rank_slices(weights, tp_rank=1, pp_rank=0) if p.parameter == name]
        assert [p.num_elements for p in pieces] == [0]
    check_coverage(weights.shapes, all_owned_slices(weights))


def _example(family: str, *, tied: bool, tp_size: int, pp_size: int) -> WeightLayout:
    shapes = HfShapes(
        model_type=family,
        vocab_size=10,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=2,
        ffn_hidden_size=6,
        tied=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
        eos_token_ids=(0,),
    )
    return WeightLayout(shapes, Layout(tp_size, pp_size, tp_size * pp_size), 10)
