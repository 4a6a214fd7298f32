"""Weight names are those that transformers gives, and unknown families are refused."""

import pytest
from safetensors import safe_open

from megatron_gkd.config.hf_shapes import load_hf_shapes
from megatron_gkd.models.families import family_of
from megatron_gkd.models.gpt import padded_vocab_size
from megatron_gkd.reshard.layout import hf_tensors
from tests.support.tiny_models import write_tiny_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_names_and_shapes_are_those_of_a_real_checkpoint(tmp_path, family: str, tied: bool):
    folder = write_tiny_model(tmp_path, family, tied=tied, num_layers=2, head_dim=20, vocab_size=300)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        real = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert hf_tensors(load_hf_shapes(folder)) == real


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'mamba' is not supported; supported: llama, qwen2, qwen3"):
        family_of("mamba")


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
