"""Sizes that follow from the configuration, and rotary frequencies against those of transformers.

What the models compute is tested against transformers in tests/distributed/test_hf_parity.py.
"""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_gkd.config.hf_shapes import load_hf_shapes
from megatron_gkd.models.gpt import padded_vocab_size
from megatron_gkd.models.transformer import rotary_frequencies
from tests.unit.config.conftest import write_hf_config

LLAMA_32 = {  # the numbers of Llama 3.2
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "rope",
    [LLAMA_32, LLAMA_32 | {"factor": 8.0}, LLAMA_32 | {"low_freq_factor": 2.0, "high_freq_factor": 3.0}],
)
def test_scaled_rotary_frequencies_are_those_of_transformers(tmp_path, rope):
    shapes = load_hf_shapes(write_hf_config(tmp_path, head_dim=128, rope_parameters=rope))
    config = LlamaConfig(num_attention_heads=4, head_dim=128, rope_parameters=rope)
    expected_F, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert attention_factor == 1.0
    frequency_F = rotary_frequencies(shapes)
    torch.testing.assert_close(frequency_F, expected_F, rtol=1e-6, atol=0)
    plain_F = 500000.0 ** -(torch.arange(64) / 64)
    is_kept_F = frequency_F > 0.999 * plain_F
    is_stretched_F = frequency_F < 1.001 * plain_F / rope["factor"]
    assert is_kept_F.any()
    assert is_stretched_F.any()
    assert (~is_kept_F & ~is_stretched_F).any()  # the mixture


def test_plain_rotary_frequencies_are_powers_of_the_base(tmp_path):
    frequency_F = rotary_frequencies(load_hf_shapes(write_hf_config(tmp_path, head_dim=8, rope_theta=1e4)))
    assert frequency_F.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-6)
    assert math.isclose(frequency_F[0], 1.0)


@pytest.mark.parametrize(
    ("vocab_size", "divisible_by", "tp_size", "padded"),
    [
        (261, 1, 1, 261),
        (261, 1, 2, 262),
        (261, 128, 1, 384),
        (1003, 64, 4, 1024),
        (1024, 128, 8, 1024),
        (1025, 128, 8, 2048),
    ],
)
def test_the_vocabulary_is_padded_to_a_multiple_that_every_rank_can_share(
    vocab_size, divisible_by, tp_size, padded
):
    assert padded_vocab_size(vocab_size, divisible_by=divisible_by, tp_size=tp_size) == padded
