"""Sizes are read from config.json as transformers would; what the models cannot do is refused.

That transformers agrees with these sizes is tested with its models in tests/unit/support/test_tiny_models.py.
"""

import json

import pytest
from transformers import AutoConfig

from megatron_gkd.config import ConfigError, load_hf_shapes
from megatron_gkd.config.hf_shapes import Llama3Scaling
from tests.unit.config.conftest import write_hf_config

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_llama_sizes_are_read_with_the_defaults_of_transformers(tmp_path):
    shapes = load_hf_shapes(
        write_hf_config(tmp_path, rms_norm_eps=None, rope_theta=None, tie_word_embeddings=None)
    )
    assert (shapes.vocab_size, shapes.hidden_size, shapes.num_layers, shapes.ffn_hidden_size) == (
        1003,
        64,
        4,
        160,
    )
    assert (shapes.num_attention_heads, shapes.num_query_groups, shapes.head_dim) == (4, 2, 16)
    assert (shapes.tied, shapes.qkv_bias, shapes.qk_norm) == (False, False, False)
    assert (shapes.rms_norm_eps, shapes.rope_theta) == (1e-6, 10000.0)


def test_llama_without_key_value_heads_has_one_per_attention_head(tmp_path):
    assert load_hf_shapes(write_hf_config(tmp_path, num_key_value_heads=None)).num_query_groups == 4


@pytest.mark.parametrize(("family", "qkv_bias", "qk_norm"), [("qwen2", True, False), ("qwen3", False, True)])
def test_qwen_variants_are_recognised(tmp_path, family, qkv_bias, qk_norm):
    shapes = load_hf_shapes(
        write_hf_config(tmp_path, model_type=family, head_dim=32, use_sliding_window=False)
    )
    assert (shapes.qkv_bias, shapes.qk_norm, shapes.head_dim) == (qkv_bias, qk_norm, 32)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e6},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 1e6}},
    ],
)
def test_the_rope_base_is_found_where_either_version_of_transformers_writes_it(tmp_path, changes):
    assert load_hf_shapes(write_hf_config(tmp_path, **changes)).rope_theta == 1e6


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_the_scaling_of_llama_3_is_read_where_either_version_writes_it(tmp_path, key):
    shapes = load_hf_shapes(write_hf_config(tmp_path, **{key: LLAMA_3}))
    assert shapes.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert shapes.rope_theta == 500000.0


@pytest.mark.parametrize(
    ("changes", "window"),
    [({}, 4096), ({"sliding_window": 1024}, 1024), ({"sliding_window": "none"}, None)],
)
def test_the_window_of_mistral_is_that_of_transformers(tmp_path, changes, window):
    folder = write_hf_config(tmp_path, model_type="mistral", **changes)
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"none"', "null"))
    assert load_hf_shapes(folder).sliding_window == window
    assert AutoConfig.from_pretrained(folder).sliding_window == window


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_other_families_do_not_heed_a_window_that_is_off(tmp_path, family):
    folder = write_hf_config(tmp_path, model_type=family, sliding_window=8, use_sliding_window=False)
    assert load_hf_shapes(folder).sliding_window is None


def test_end_tokens_come_from_both_files_without_repeats(tmp_path):
    folder = write_hf_config(tmp_path, eos_token_id=[5, 2])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert load_hf_shapes(folder).eos_token_ids == (5, 2, 7)
    assert load_hf_shapes(write_hf_config(tmp_path / "none", eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'; supported: llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type='None'; supported: llama"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; supported: silu"),
        ({"attention_bias": True}, "attention_bias=True; supported: false"),
        ({"mlp_bias": True}, "mlp_bias=True; supported: false"),
        ({"use_sliding_window": True}, "use_sliding_window=True; supported: false"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
        ({"rope_scaling": LLAMA_3 | {"factor": 0}}, "factor=0; a number above 0"),
        ({"rope_scaling": LLAMA_3 | {"low_freq_factor": 4}}, "it must be below high_freq_factor=4"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25; supported: 1.0"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0; a whole number of at least 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; supported: 1.0"),
        ({"quantization_config": {"bits": 4}}, "save the weights unquantized first"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "big"}, "vocab_size='big'; a whole number of at least 1"),
        ({"rope_theta": -1}, "rope_theta=-1; a number above 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"model_type": "qwen3"}, "head_dim is missing"),
        ({"model_type": "qwen2", "num_key_value_heads": None}, "num_key_value_heads is missing"),
    ],
)
def test_an_unsupported_setting_is_named_with_what_is_supported(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=r"config\.json:") as caught:
        load_hf_shapes(write_hf_config(tmp_path, **changes))
    assert message in str(caught.value)


def test_all_unsupported_settings_are_reported_at_once(tmp_path):
    with pytest.raises(ConfigError, match="3 problems"):
        load_hf_shapes(write_hf_config(tmp_path, hidden_act="gelu", mlp_bias=True, vocab_size=0))


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_an_unreadable_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"config\.json (cannot be read|holds list)"):
        load_hf_shapes(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_hf_shapes(tmp_path)
