"""Pruning on tiny models. How well a pruned real model starts and recovers is measured by the quickstart."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_gkd.checkpoint.prune import (
    check_shape,
    count_parameters,
    fit_ffn,
    prune_checkpoint,
    student_config,
)
from megatron_gkd.checkpoint.prune_measure import CalibrationRow, CalibrationText, mean_kl, measure_blocks
from megatron_gkd.checkpoint.prune_refit import add_query_groups, choose_channels, fit_ridge
from tests.support.tiny_models import write_tiny_model

FAMILIES = ("llama", "qwen2", "qwen3")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_rows(num_rows=12, length=24):
    generator = torch.Generator().manual_seed(1)
    lengths = [length - i % 5 for i in range(num_rows)]
    return [
        CalibrationRow(tuple(torch.randint(0, 250, (n,), generator=generator).tolist()), 6) for n in lengths
    ]


def make_idle(model, *indices):
    """These layers no longer change the residual stream."""
    for index in indices:
        layer = model.base_model.layers[index]
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_added_query_groups_change_nothing_and_can_learn(tmp_path, family):
    model = load(write_tiny_model(tmp_path, family, hidden_size=72, num_heads=9, num_groups=3, head_dim=16))
    config = student_config(model.config, (), model.config.intermediate_size, heads=(12, 4))

    padded = add_query_groups(model, config)

    tokens = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    assert padded.model.layers[0].self_attn.q_proj.weight.shape == (12 * 16, 72)
    torch.testing.assert_close(padded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    padded(tokens, labels=tokens).loss.backward()
    assert padded.model.layers[0].self_attn.o_proj.weight.grad[:, 9 * 16 :].norm() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_checkpoint_keeps_to_its_sizes_and_loads(tmp_path, family):
    teacher = write_tiny_model(
        tmp_path / "teacher", family, hidden_size=48, num_heads=3, num_groups=3, head_dim=16, ffn=96
    )

    report = prune_checkpoint(
        teacher, tmp_path / "student", make_rows(), keep_ratio=0.8, tp_size=2, num_layers=3
    )

    student = load(tmp_path / "student")
    assert student.num_parameters() == report.num_parameters <= 0.8 * load(teacher).num_parameters()
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (4, 4)
    assert student.config.head_dim == 16
    assert student.config.num_hidden_layers == 3
    assert student.config.intermediate_size == report.ffn_hidden_size
    assert student.config.intermediate_size % 2 == 0
    assert report.added_groups_logit_difference < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "student").chat_template
    assert json.loads((tmp_path / "student" / "pruning_report.json").read_text())["dropped_layers"] == list(
        report.dropped_layers
    )


def test_layers_that_do_nothing_are_the_ones_dropped(tmp_path, tiny_llama):
    teacher = load(tiny_llama)
    make_idle(teacher, 1, 2)
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "teacher")

    report = prune_checkpoint(
        tmp_path / "teacher", tmp_path / "student", make_rows(), keep_ratio=1.0, num_layers=2
    )

    assert report.dropped_layers == (1, 2)
    assert report.kl_by_first_dropped_layer[1] == pytest.approx(0, abs=1e-5)
    assert report.kl == pytest.approx(0, abs=1e-5)


def test_block_search_measures_the_model_without_the_block(tiny_llama):
    teacher, text = load(tiny_llama), CalibrationText.of(make_rows())
    tried = measure_blocks(teacher, text, 2)

    without = load(tiny_llama)
    without.base_model.layers = without.base_model.layers[2:]
    without.config.num_hidden_layers = 2
    assert list(tried) == [0, 1, 2]
    assert tried[0] == pytest.approx(mean_kl(teacher, without, text), rel=1e-4)


def test_refit_starts_closer_to_the_teacher_than_cutting_alone(tmp_path, tiny_llama):
    rows = make_rows(num_rows=40)
    report = prune_checkpoint(tiny_llama, tmp_path / "student", rows, keep_ratio=1.0, num_layers=3)

    assert report.kl < 0.9 * min(report.kl_by_first_dropped_layer.values())


def test_without_refit_what_remains_are_rows_of_the_teacher(tmp_path, tiny_llama):
    report = prune_checkpoint(
        tiny_llama,
        tmp_path / "student",
        make_rows(),
        keep_ratio=1.0,
        num_layers=3,
        ffn_hidden_size=128,
        refits=False,
    )

    whole = load(tiny_llama).base_model.layers
    kept = [whole[i] for i in range(4) if i not in report.dropped_layers]
    for old, new in zip(kept, load(tmp_path / "student").base_model.layers, strict=True):
        assert new.self_attn.q_proj.weight.equal(old.self_attn.q_proj.weight)
        old_columns = {tuple(column) for column in old.mlp.down_proj.weight.T.tolist()}
        assert {tuple(column) for column in new.mlp.down_proj.weight.T.tolist()} < old_columns


def test_only_one_of_two_equal_channels_is_cheap():
    a_NF = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    a_NF = torch.cat([a_NF, a_NF], dim=1).double()
    down_HF = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))

    kept_K = choose_channels(a_NF.T @ a_NF, down_HF, 8, 1e-6)

    assert sorted(index % 8 for index in kept_K.tolist()) == list(range(8))
    assert kept_K.tolist() == sorted(kept_K.tolist())


@given(seed=st.integers(0, 1000), ridge=st.floats(1e-3, 10.0))
@settings(max_examples=20, deadline=None)
def test_ridge_solution_has_no_gradient(seed, ridge):
    generator = torch.Generator().manual_seed(seed)
    a_NK = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    missing_NH = torch.randn(30, 4, generator=generator, dtype=torch.float64)

    weight_HK = fit_ridge(a_NK.T @ a_NK, a_NK, missing_NH, ridge).requires_grad_()

    error = (missing_NH - a_NK @ weight_HK.T).square().sum() + ridge * weight_HK.square().sum()
    error.backward()
    assert weight_HK.grad.abs().max() < 1e-9


def test_room_for_channels_is_filled_and_not_exceeded(tiny_llama):
    config = load(tiny_llama).config
    ffn = fit_ffn(config, 0.8, num_layers=4, tp_size=2)

    sizes = [count_parameters(student_config(config, (), ffn + more)) for more in (0, 16)]
    assert sizes[0] <= 0.8 * count_parameters(config) < sizes[1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_layers": 5, "ffn": 64}, "5 layers were requested; the teacher has 4"),
        ({"num_layers": 4, "ffn": 63}, "63 FFN channels are not divisible by tp 2"),
        ({"num_layers": 4, "ffn": 160}, "more than 50.0%; keep fewer"),
    ],
)
def test_impossible_sizes_are_refused_with_their_numbers(tiny_llama, sizes, message):
    with pytest.raises(ValueError, match=message):
        check_shape(load(tiny_llama).config, 0.5, tp_size=2, **sizes)


def test_too_little_calibration_text_is_refused(tmp_path, tiny_llama):
    with pytest.raises(ValueError, match="give more text"):
        prune_checkpoint(tiny_llama, tmp_path / "student", make_rows(num_rows=2), keep_ratio=1.0)
