"""Models whose files are missing or cut off, and output folders that cannot take a checkpoint."""

import json
import math
from types import SimpleNamespace

import pytest

from megatron_gkd.config import weight_files
from megatron_gkd.config.hf_shapes import load_hf_shapes
from megatron_gkd.config.weight_files import find_checkpoint_problems, find_hf_problems, find_output_problems
from tests.support.tiny_models import write_tiny_model


@pytest.fixture
def model(tmp_path):
    return write_tiny_model(tmp_path / "model", seed=1)


def cut(file, num_bytes):
    file.write_bytes(file.read_bytes()[:-num_bytes])


def write_index(folder, *names):
    weight_map = {f"tensor_{i}": name for i, name in enumerate(names)}
    (folder / weight_files.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_whole_model_has_no_problem(model):
    assert list(find_hf_problems(model)) == []
    write_index(model, "model.safetensors")
    assert list(find_hf_problems(model)) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "there is no model.safetensors"),
        (lambda folder: cut(folder / "model.safetensors", 1), "bytes instead of"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 20), "cut off in its header"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\1" + bytes(7) + b"x"), "no safetensors"),
        (lambda folder: write_index(folder, "a.safetensors", "b.safetensors"), "2 of 2 weight files are missing"),
        (lambda folder: (folder / weight_files.INDEX).write_text("{}"), "index.json cannot be read"),
    ],
)  # fmt: skip
def test_damage_to_a_model_is_found(model, damage, message):
    damage(model)
    (problem,) = find_hf_problems(model)
    assert message in problem
    assert str(model) in problem


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "was not finished"),
        ("{", "cannot be read"),
        ('{"files": {"a": {"size": 3}}}', "a is missing"),
        ('{"files": {"b": {"size": 3}}}', "has 4 bytes instead of 3"),
        ('{"files": {"b": {"size": 4}}}', None),
    ],
)
def test_damage_to_a_checkpoint_is_found_without_reading_it(tmp_path, files, message):
    (tmp_path / "b").write_bytes(b"1234")
    if files is not None:
        (tmp_path / "manifest.json").write_text(files)
    problems = list(find_checkpoint_problems(tmp_path))
    assert len(problems) == (message is not None)
    assert all(message in problem for problem in problems)


def test_a_new_folder_below_an_existing_one_can_be_written(tmp_path):
    assert list(find_output_problems(tmp_path / "a" / "b", 1)) == []


def test_a_file_cannot_be_the_output_folder(tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in next(find_output_problems(tmp_path / "file" / "run", 1))


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "is not writable" in next(find_output_problems(tmp_path / "run", 1))


def test_too_little_space_is_told_in_gib(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 * 2**29))
    (problem,) = find_output_problems(tmp_path / "run", 2**31)
    assert "1.5 GiB free" in problem
    assert "2.0 GiB" in problem


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_transformers_counts_them(tmp_path, family, tied):
    from safetensors import safe_open

    folder = write_tiny_model(tmp_path / "model", seed=0, family=family, tied=tied)
    with safe_open(folder / "model.safetensors", framework="np") as file:
        sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    assert load_hf_shapes(folder).num_parameters == sum(sizes)
