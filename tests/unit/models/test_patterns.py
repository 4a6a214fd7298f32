"""A glob pattern means the same weights by either name, and what it cannot mean is explained."""

import pytest

from megatron_gkd.config import ConfigError, OptimConfig, StudentConfig, load_hf_shapes
from megatron_gkd.models.patterns import (
    all_weights,
    frozen_tensors,
    resolve_patterns,
    summarise,
    undecayed_tensors,
)
from megatron_gkd.reshard.layout import hf_tensors
from tests.unit.config.conftest import write_hf_config


def shapes_of(folder, **changes):
    return load_hf_shapes(write_hf_config(folder, **changes))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_the_weights_are_those_of_the_checkpoint(tmp_path, model_type, tied):
    shapes = shapes_of(tmp_path, model_type=model_type, tie_word_embeddings=tied, head_dim=16)
    names = [name for weight in all_weights(shapes) for name in weight.hf]
    assert len(names) == len(set(names))
    assert set(names) == set(hf_tensors(shapes))


@pytest.mark.parametrize(
    ("hf", "megatron"),
    [
        ("model.embed_tokens.weight", "embedding.*"),
        ("model.layers.2.self_attn.[qkv]_proj.weight", "decoder.layers.2.self_attention.linear_qkv.weight"),
        ("model.layers.*.mlp.*", "decoder.layers.*.mlp.*.weight"),
        ("model.norm.weight", "decoder.final_layernorm.weight"),
        (
            "*.3.input_layernorm.weight",
            "*.3.self_attention.linear_qkv.layer_norm_weight",
        ),  # Transformer Engine
        ("lm_head.weight", "output_layer.weight"),
    ],
)
def test_both_names_of_a_weight_mean_the_same(tmp_path, hf, megatron):
    shapes = shapes_of(tmp_path, tie_word_embeddings=False)
    by_hf = resolve_patterns("key", [hf], shapes)
    assert by_hf
    assert by_hf == resolve_patterns("key", [megatron], shapes)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "model.layers.*.self_attn.out_proj.weight",
            r"matches no tensor .*near names: .*self_attn\.o_proj\.weight",
        ),
        ("embeding.word_embeddings.weight", r"near names: embedding\.word_embeddings\.weight"),
        ("lm_head.weight", "matches no tensor"),  # a tied model has none
        ("model.layers.4.*", r"near names: model\.layers\.\*"),  # there are four
        ("12345", "known names: model.embed_tokens.weight"),
    ],
)
def test_a_pattern_without_a_match_is_refused_with_near_names(tmp_path, pattern, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_patterns("student.freeze", ["*norm*", pattern], shapes_of(tmp_path))
    assert str(caught.value).startswith(f"1 problem in student.freeze:\n  {pattern!r}")


def test_a_part_of_a_fused_parameter_is_refused_once(tmp_path):
    with pytest.raises(
        ConfigError, match=r"linear_qkv.weight holds .*v_proj.weight is not matched"
    ) as caught:
        resolve_patterns("student.freeze", ["*.q_proj.*", "*.k_proj.*"], shapes_of(tmp_path))
    assert str(caught.value).startswith("1 problem in")


def test_by_default_biases_and_norms_have_no_weight_decay(tmp_path):
    llama = undecayed_tensors(OptimConfig(), shapes_of(tmp_path / "llama"))
    assert {name.split(".")[-2] for name in llama} == {"input_layernorm", "post_attention_layernorm", "norm"}
    qwen2 = undecayed_tensors(OptimConfig(), shapes_of(tmp_path / "qwen2", model_type="qwen2"))
    assert {name for name in qwen2 if name.endswith(".bias")} == {
        f"model.layers.{i}.self_attn.{x}_proj.bias" for i in range(4) for x in "qkv"
    }
    qwen3 = undecayed_tensors(OptimConfig(), shapes_of(tmp_path / "qwen3", model_type="qwen3", head_dim=16))
    assert "model.layers.3.self_attn.q_norm.weight" in qwen3


def test_other_patterns_of_weight_decay_must_match(tmp_path):
    shapes = shapes_of(tmp_path)
    assert undecayed_tensors(OptimConfig(no_weight_decay=()), shapes) == frozenset()
    assert undecayed_tensors(OptimConfig(no_weight_decay=("*embed*",)), shapes) == {
        "model.embed_tokens.weight"
    }
    with pytest.raises(ConfigError, match=r"optim\.no_weight_decay:\n  '\*\.biases' matches no tensor"):
        undecayed_tensors(OptimConfig(no_weight_decay=("*.biases",)), shapes)


def test_a_student_that_is_frozen_altogether_is_refused(tmp_path):
    shapes = shapes_of(tmp_path)
    student = StudentConfig(hf=tmp_path, freeze=("model.embed*", "decoder.*"))
    with pytest.raises(
        ConfigError, match=r"student\.freeze=.* matches every tensor of the student; leave some"
    ):
        frozen_tensors(student, shapes)
    assert "model.norm.weight" not in frozen_tensors(
        StudentConfig(hf=tmp_path, freeze=("model.embed*", "decoder.layers.*")), shapes
    )


def test_the_summary_counts_layers(tmp_path):
    frozen = resolve_patterns("key", ["model.layers.[01].mlp.down*", "model.norm.*"], shapes_of(tmp_path))
    assert summarise(frozen) == "model.layers.*.mlp.down_proj.weight (2), model.norm.weight"
