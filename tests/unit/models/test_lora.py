"""Values of adapters that need no ranks; what they compute in a model: tests/distributed/test_lora."""

from types import SimpleNamespace

import pytest
import torch

from megatron_gkd.models.lora import LoraSpec, _draw_uniform, _linear_input


def test_a_spec_survives_json():
    spec = LoraSpec(4, 8.0, 0.1, ("linear_qkv", "linear_fc2"))
    assert LoraSpec.from_json(spec.to_json()) == spec


def test_a_layer_that_holds_its_norm_gives_the_adapter_the_normalised_input():
    x_SBH, gain_H = torch.randn(3, 2, 8), torch.rand(8) + 0.5
    layer = SimpleNamespace(layer_norm_weight=gain_H, eps=1e-5)
    expected = x_SBH / (x_SBH.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain_H
    torch.testing.assert_close(_linear_input(layer, x_SBH), expected)
    assert _linear_input(SimpleNamespace(), x_SBH) is x_SBH


def test_the_first_a_fills_its_interval_and_depends_on_its_name():
    first = _draw_uniform(64, 400, "1/2/linear_qkv")
    assert first.abs().max() == pytest.approx(0.05, rel=1e-2)
    assert first.mean().abs() < 1e-3
    assert torch.equal(first, _draw_uniform(64, 400, "1/2/linear_qkv"))
    assert not torch.equal(first, _draw_uniform(64, 400, "1/3/linear_qkv"))
