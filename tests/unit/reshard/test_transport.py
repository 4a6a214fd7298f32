"""The safetensors file that ranks fill in place is one that safetensors reads; damaged sources are named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_gkd.reshard import transport
from megatron_gkd.reshard.layout import Slice
from megatron_gkd.reshard.transport import HfFolder, MappedSafetensors, find_difference, read_slices

WHOLE = ((0, 4), (0, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slices_of_two_writers_make_one_file_that_safetensors_loads(tmp_path, dtype):
    file = MappedSafetensors({"a": (4, 6), "odd": (3,), "b": (2, 2)}, dtype)
    values = {"a": torch.randn(4, 6), "odd": torch.randn(3), "b": torch.randn(2, 2)}
    left = [Slice("p", ((0, 4), (0, 2)), "a", ((0, 4), (4, 6))), Slice("odd", ((0, 3),), "odd", ((0, 3),))]
    right = [
        Slice("p", ((0, 4), (0, 4)), "a", ((0, 4), (0, 4))),
        Slice("b", ((0, 2), (0, 2)), "b", ((0, 2), (0, 2))),
    ]
    target = tmp_path / "new" / "model.safetensors"
    file.create(target)
    written = file.write(target, {"p": values["a"][:, 4:], "odd": values["odd"]}, left)
    written += file.write(target, {"p": values["a"][:, :4], "b": values["b"]}, right)
    assert written == file.num_data_bytes == (24 + 3 + 4) * dtype.itemsize
    loaded = load_file(target)
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(loaded[name], value.to(dtype))


def test_a_second_file_of_the_same_name_keeps_no_rest_of_a_longer_one(tmp_path):
    target = tmp_path / "model.safetensors"
    MappedSafetensors({"a": (400,)}, torch.float32).create(target)
    small = MappedSafetensors({"b": (4,)}, torch.float32)
    small.create(target)
    small.write(target, {"p": torch.arange(4.0)}, [Slice("p", ((0, 4),), "b", ((0, 4),))])
    assert torch.equal(load_file(target)["b"], torch.arange(4.0))


def test_only_the_asked_block_is_read_and_converted(tmp_path):
    save_file({"a": torch.arange(24.0).view(4, 6)}, tmp_path / "model.safetensors")
    source = HfFolder(tmp_path)

    assert source.dtype("a") == torch.float32
    parameter = torch.full((3, 3), -1.0, dtype=torch.bfloat16)
    read_slices({"p": parameter}, source, [Slice("p", ((1, 3), (0, 2)), "a", ((2, 4), (4, 6)))])
    assert parameter.tolist() == [[-1, -1, -1], [16, 17, -1], [22, 23, -1]]


@pytest.mark.parametrize("max_elements", [1, 5, 12, 13, 1000])
def test_reading_in_blocks_of_rows_gives_the_same_and_never_holds_more(tmp_path, monkeypatch, max_elements):
    save_file({"a": torch.arange(24.0).view(4, 6), "b": torch.arange(7.0)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(transport, "_BLOCK_ELEMENTS", max_elements)
    source, sizes = HfFolder(tmp_path), []
    read = source.read
    monkeypatch.setattr(
        source, "read", lambda *block: sizes.append((result := read(*block)).numel()) or result
    )
    parameters = {"p": torch.full((5, 6), -1.0), "b": torch.zeros(7)}
    slices = [Slice("p", ((1, 5), (0, 6)), "a", ((0, 4), (0, 6))), Slice("b", ((0, 7),), "b", ((0, 7),))]
    read_slices(parameters, source, slices)
    assert parameters["p"].tolist() == [[-1] * 6, *torch.arange(24.0).view(4, 6).tolist()]
    assert parameters["b"].tolist() == list(range(7))
    assert max(sizes) <= max(max_elements, 6), "a row is the least that is read"


def test_a_difference_of_one_bit_is_found_and_nan_equals_itself(tmp_path):
    weights = {"a": torch.tensor([[0.0, float("nan")], [2.0, 3.0]]), "b": torch.ones(2)}
    save_file(weights, tmp_path / "model.safetensors")
    slices = [Slice("p", ((0, 2), (0, 2)), "a", ((0, 2), (0, 2))), Slice("b", ((0, 2),), "b", ((0, 2),))]
    own = {"p": weights["a"].clone(), "b": weights["b"].clone()}
    assert find_difference(own, HfFolder(tmp_path), slices) is None
    own["p"][0, 0] = -0.0
    assert find_difference(own, HfFolder(tmp_path), slices) == "a"
    assert (
        find_difference(own | {"p": weights["a"], "b": torch.ones(2).bfloat16()}, HfFolder(tmp_path), slices)
        == "b"
    )


def test_tensors_are_found_in_several_files_with_and_without_an_index(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x-1.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "x-2.safetensors")
    assert HfFolder(tmp_path).names == {"a", "b"}
    index = {"weight_map": {"b": "x-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert HfFolder(tmp_path).names == {"b"}


def test_unusable_sources_are_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors"):
        HfFolder(tmp_path)
    save_file({"a": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    source = HfFolder(tmp_path)
    with pytest.raises(ValueError, match="data type I8; supported"):
        source.dtype("a")
    with pytest.raises(ValueError, match=r"no tensor 'b'; is config\.json from the same model"):
        source.read("b", ((0, 1),))


def test_a_parameter_without_any_slice_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    parameters = {"p": torch.zeros(2), "forgotten": torch.zeros(2)}
    with pytest.raises(ValueError, match="forgotten"):
        read_slices(parameters, HfFolder(tmp_path), [Slice("p", ((0, 2),), "a", ((0, 2),))])
