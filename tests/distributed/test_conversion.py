"""Weights survive every way between Hugging Face folders and ranks bit for bit, in every layout.

Not here: the command lines of the tools (end-to-end tests), training checkpoints (test_checkpoint_store).
"""

import contextlib
import json
import logging
import threading
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.on_ranks import (
    CPU,
    DP,
    PP2,
    TP2,
    TP2_PP2,
    Split,
    allow_saving,
    convert_folders,
    load_model,
    no_kernels,
    student_groups,
)
from tests.support.tiny_models import write_tiny_model

MODELS = {
    "llama_tied": {"family": "llama", "vocab_size": 261, "tied": True},
    "llama_untied_bf16": {"family": "llama", "vocab_size": 1003, "tied": False, "dtype": torch.bfloat16},
    "qwen2_untied": {"family": "qwen2", "vocab_size": 261, "tied": False},
    "qwen3_tied": {"family": "qwen3", "vocab_size": 1003, "tied": True, "head_dim": 24},
    # the two sizes of Qwen2.5, whose tokenizers have 151,643 tokens and some special ones
    "qwen2_151936": {"family": "qwen2", "vocab_size": 151936, "tied": True, "hidden_size": 8},
    "qwen2_152064": {"family": "qwen2", "vocab_size": 152064, "tied": False, "hidden_size": 8},
}


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory) -> list[Path]:
    folders = []
    for seed, (name, options) in enumerate(MODELS.items()):
        options = {"num_layers": 2, "hidden_size": 32, "ffn": 96, "seed": seed, **options}
        dtype = options.pop("dtype", torch.float32)
        folder = write_tiny_model(tmp_path_factory.mktemp("hf") / name, **options)
        if dtype != torch.float32:
            _change_weights(folder, lambda weights, dtype=dtype: {k: v.to(dtype) for k, v in weights.items()})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")})
        )
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def checkpoints(hf_folders, run_on_ranks, tmp_path_factory) -> list[Path]:
    """The same models converted by one process, as the tool does it."""
    folders = [tmp_path_factory.mktemp("megatron") / hf.name for hf in hf_folders]
    run_on_ranks(1, convert_folders, list(zip(hf_folders, folders, strict=True)))
    return folders


@pytest.mark.parametrize(("num_ranks", "split"), [(2, TP2), (2, PP2), (2, DP), (4, TP2_PP2)], ids=str)
def test_every_tensor_returns_bit_equal_through_any_layout(
    run_on_ranks, hf_folders, checkpoints, tmp_path, num_ranks: int, split: Split
):
    names = [hf.name for hf in hf_folders]
    jobs = [(hf, False, tmp_path / f"{hf.name}.direct") for hf in hf_folders]
    jobs += [(folder, True, tmp_path / f"{folder.name}.converted") for folder in checkpoints]
    run_on_ranks(num_ranks, _load_and_export, jobs, split)
    for hf, name in zip(hf_folders, names, strict=True):
        for way in ("direct", "converted"):
            _assert_equal_tensors(hf / "model.safetensors", tmp_path / f"{name}.{way}")


def test_converting_there_and_back_restores_the_folder(run_on_ranks, hf_folders, checkpoints, tmp_path):
    run_on_ranks(1, _convert_back, [(folder, tmp_path / folder.name) for folder in checkpoints])
    for hf in hf_folders:
        back = tmp_path / hf.name
        _assert_equal_tensors(hf / "model.safetensors", back / "model.safetensors")
        side_files = {file.name for file in hf.iterdir()} - {"model.safetensors"}
        assert {
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "chat_template.jinja",
        } <= side_files
        for name in side_files:
            assert (back / name).read_bytes() == (hf / name).read_bytes(), f"{hf.name}: {name} changed"
        assert {file.name for file in back.iterdir()} == side_files | {"model.safetensors"}


def test_a_converted_checkpoint_carries_config_and_tokenizer(hf_folders, checkpoints):
    for hf, checkpoint in zip(hf_folders, checkpoints, strict=True):
        assert not checkpoint.with_name(checkpoint.name + ".tmp").exists()
        copied = {file.name for file in (checkpoint / "hf").iterdir()}
        assert copied == {file.name for file in hf.iterdir()} - {"model.safetensors"}


def test_conversion_needs_little_memory_and_reports_its_progress(run_on_ranks, tmp_path):
    """A weight is read into a second copy, and the embedding is a quarter of this model; import starts two writers.

    Measured: import 0.90 to 1.09 of the model, export 0.51 to 0.77. Who holds all of it beside a weight has 1.25.
    """
    sizes = {"vocab_size": 16000, "hidden_size": 512, "num_layers": 8, "ffn": 1536, "num_heads": 8}
    hf = write_tiny_model(tmp_path / "hf", tied=True, **sizes)
    run_on_ranks(1, _convert_with_little_memory, hf, tmp_path / "megatron", tmp_path / "back")
    _assert_equal_tensors(hf / "model.safetensors", tmp_path / "back" / "model.safetensors")


@pytest.mark.parametrize("way", ["import", "export"])
def test_what_was_written_wrongly_is_found_and_not_kept(run_on_ranks, hf_folders, checkpoints, tmp_path, way):
    source = hf_folders if way == "import" else checkpoints
    run_on_ranks(1, _convert_on_a_bad_disk, source[0], tmp_path / "out", way)
    assert not (tmp_path / "out").exists()


def test_an_existing_target_is_refused_and_left_alone(hf_folders, checkpoints, tmp_path):
    from megatron_gkd.checkpoint.hf import convert_hf_to_megatron, convert_megatron_to_hf

    (tmp_path / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="choose another --out"):
        convert_hf_to_megatron(hf_folders[0], tmp_path, None, None, CPU)
    with pytest.raises(FileExistsError, match="choose another --out"):
        convert_megatron_to_hf(checkpoints[0], tmp_path, None, None, CPU)
    assert (tmp_path / "mine").read_text() == "keep"


def test_mixed_number_formats_are_refused(tmp_path):
    from megatron_gkd.checkpoint.hf import convert_hf_to_megatron

    folder = write_tiny_model(tmp_path / "mixed", num_layers=1)
    _change_weights(folder, lambda w: {**w, "model.norm.weight": w["model.norm.weight"].bfloat16()})
    with pytest.raises(ValueError, match=r"bfloat16.*float32.*save it in one data type"):
        convert_hf_to_megatron(folder, tmp_path / "out", None, None, CPU)
    assert not (tmp_path / "out").exists()


def test_a_missing_tensor_is_named(tmp_path):
    from megatron_gkd.checkpoint.hf import convert_hf_to_megatron

    folder = write_tiny_model(tmp_path / "holed", num_layers=2)
    hole = "model.layers.1.mlp.up_proj.weight"
    _change_weights(folder, lambda weights: {name: w for name, w in weights.items() if name != hole})
    with pytest.raises(ValueError, match=rf"lacks 1 tensors .*{hole}"):
        convert_hf_to_megatron(folder, tmp_path / "out", None, None, CPU)


def test_a_damaged_checkpoint_is_refused_on_all_ranks(run_on_ranks, checkpoints, tmp_path):
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoints[0], damaged)
    file = next((damaged / "weights").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run_on_ranks(2, _expect_refusal, damaged, file.name)


def _convert_with_little_memory(rank: int, world_size: int, hf: Path, checkpoint: Path, back: Path) -> None:
    from megatron_gkd.checkpoint.hf import convert_hf_to_megatron, convert_megatron_to_hf

    allow_saving()
    size = (hf / "model.safetensors").stat().st_size
    assert size > 100e6, "noise would count"
    ways = ((convert_hf_to_megatron, hf, checkpoint, 1.25), (convert_megatron_to_hf, checkpoint, back, 0.9))
    for convert, source, out, largest_share in ways:
        with (
            student_groups(DP) as groups,
            PeakMemory() as memory,
            recorded("megatron_gkd.checkpoint.hf") as log,
        ):
            convert(source, out, groups, no_kernels(), CPU)
        assert memory.grown_bytes < largest_share * size, (
            f"{out.name}: {memory.grown_bytes / size:.2f} of the model"
        )
        reports = [line for line in log if " % (" in line]
        assert len(reports) >= 5, log
        assert " 100 % (" in reports[-1]


class PeakMemory:
    """Growth of the memory of this process and its children while the block runs; pages of files do not count."""

    def __enter__(self):
        self._before, self.grown_bytes, self._stop = self._measure(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.grown_bytes = max(self.grown_bytes, self._measure() - self._before)

    @staticmethod
    def _measure() -> int:
        total = _anonymous_bytes("self")
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                total += _private_bytes(child.pid)
        return total


def _anonymous_bytes(pid: str) -> int:
    line = next(
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon")
    )
    return int(line.split()[1]) * 1024


def _private_bytes(pid: int) -> int:
    """Pages that a forked writer does not share with its parent."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


@contextlib.contextmanager
def recorded(logger_name: str):
    """The messages of a logger."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


def _convert_on_a_bad_disk(rank: int, world_size: int, source: Path, out: Path, way: str) -> None:
    """One number of what is read back differs from what was written."""
    from megatron_gkd.checkpoint import hf as converter
    from megatron_gkd.checkpoint.integrity import CheckpointError

    allow_saving()
    with student_groups(DP) as groups, pytest.MonkeyPatch.context() as patch:
        if way == "import":
            stream = converter.stream_weights

            def streamed(*args):
                for name, tensor in stream(*args):
                    tensor.view(-1)[-1] += 1
                    yield name, tensor

            patch.setattr(converter, "stream_weights", streamed)
            convert = converter.convert_hf_to_megatron
        else:
            read = converter.HfFolder.read
            patch.setattr(converter.HfFolder, "read", lambda self, *block: read(self, *block) + 1)
            convert = converter.convert_megatron_to_hf
        with pytest.raises(CheckpointError, match="is the disk faulty"):
            convert(source, out, groups, no_kernels(), CPU)


def _convert_back(rank: int, world_size: int, jobs) -> None:
    from megatron_gkd.checkpoint.hf import convert_megatron_to_hf

    with student_groups(DP) as groups:
        for checkpoint, out in jobs:
            convert_megatron_to_hf(checkpoint, out, groups, no_kernels(), CPU)


def _load_and_export(rank: int, world_size: int, jobs, split: Split) -> None:
    from megatron_gkd.config.hf_shapes import load_hf_shapes
    from tests.support.export import export_weights

    with student_groups(split) as groups:
        for folder, is_checkpoint, out in jobs:
            dtype = torch.bfloat16 if "bf16" in folder.name else torch.float32
            model = load_model(folder, groups, split, is_checkpoint=is_checkpoint, dtype=dtype)
            shapes = load_hf_shapes(folder / "hf" if is_checkpoint else folder)
            export_weights(model, out, shapes, groups, dtype)


def _expect_refusal(rank: int, world_size: int, damaged: Path, file: str) -> None:
    from megatron_gkd.checkpoint.integrity import CheckpointError

    with (
        student_groups(TP2) as groups,
        pytest.raises(CheckpointError, match=f"{file} does not match its hash"),
    ):
        load_model(damaged, groups, TP2, is_checkpoint=True)


def _change_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    save_file(
        {k: v.contiguous() for k, v in change(load_file(file)).items()}, file, metadata={"format": "pt"}
    )


def _assert_equal_tensors(expected_file: Path, got_file: Path) -> None:
    expected, got = load_file(expected_file), load_file(got_file)
    assert got.keys() == expected.keys()
    different = [
        name
        for name in expected
        if got[name].dtype != expected[name].dtype or not torch.equal(got[name], expected[name])
    ]
    assert not different, f"{got_file.name}: {different}"
