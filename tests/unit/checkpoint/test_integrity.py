"""A folder counts only if every file is as its manifest says; the manifest here is written by hand."""

import hashlib
import json
from pathlib import Path

import pytest

from megatron_gkd.checkpoint.integrity import CheckpointError, find_damage, read_manifest

CONTENTS = {
    "state.json": b"{}",
    "weights/0.distcp": bytes(range(256)) * 40,
    "weights/1.distcp": b"",
    "hf/config.json": b"x",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {}
    for name, content in CONTENTS.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "weights", "files": files}))
    return tmp_path


def test_a_whole_folder_has_no_damage(folder: Path):
    assert find_damage(folder) is None
    assert read_manifest(folder)["kind"] == "weights"


@pytest.mark.parametrize("name", CONTENTS)
def test_a_missing_file_is_named(folder: Path, name: str):
    (folder / name).unlink()
    assert find_damage(folder) == f"{folder / name} is missing"


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_of_another_size_is_named_with_both_sizes(folder: Path, name: str):
    (folder / name).write_bytes(CONTENTS[name] + b"!")
    assert f"{name} has {len(CONTENTS[name]) + 1} bytes instead of {len(CONTENTS[name])}" in find_damage(
        folder
    )


@pytest.mark.parametrize("position", [0, 5000, 10239])
def test_a_single_flipped_bit_is_found(folder: Path, position: int):
    content = bytearray(CONTENTS["weights/0.distcp"])
    content[position] ^= 1
    (folder / "weights/0.distcp").write_bytes(content)
    assert "0.distcp does not match its hash" in find_damage(folder)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "not a complete checkpoint"),
        ('{"files": {', "is not JSON"),
        ("{}", "no object with files"),
        ("[]", "no object with files"),
    ],
)
def test_an_unusable_manifest_is_damage(folder: Path, manifest: str | None, message: str):
    if manifest is None:
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text(manifest)
    assert message in find_damage(folder)


def test_reading_an_unusable_manifest_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("name", CONTENTS)
def test_the_ranks_together_look_at_every_file(folder: Path, name: str, num_ranks: int):
    (folder / name).write_bytes(b"damaged")
    found = [find_damage(folder, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert sum(damage is not None for damage in found) == 1
