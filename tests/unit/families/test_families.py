"""Weight names are those that transformers gives, and unknown families are refused."""

import pytest
from safetensors import safe_open

from megatron_gkd.config.hf_shapes import load_hf_shapes
from megatron_gkd.families import FAMILIES, family_of
from megatron_gkd.reshard.layout import hf_tensors
from tests.support.tiny_models import write_tiny_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_a_real_checkpoint(tmp_path, family: str, tied: bool):
    folder = write_tiny_model(tmp_path, family, tied=tied, num_layers=2, head_dim=20, vocab_size=300)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        real = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert hf_tensors(load_hf_shapes(folder)) == real


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="model_type='mamba'; supported: llama, mistral, qwen2, qwen3"):
        family_of("mamba")


def test_variants_are_told_by_the_weights_of_a_family():
    assert {name for name, family in FAMILIES.items() if family.has_qkv_bias} == {"qwen2"}
    assert {name for name, family in FAMILIES.items() if family.has_qk_norm} == {"qwen3"}
