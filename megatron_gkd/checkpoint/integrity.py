"""Manifests: a checkpoint folder counts only with a manifest whose sizes and hashes match its files.

The manifest is written last and the folder gets its final name after that, so a half-written checkpoint has neither.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_gkd.parallel.collectives import any_rank, gather_json

MANIFEST = "manifest.json"
_BLOCK = 1 << 22


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the folder and what is wrong with it."""


FileFacts = dict[str, dict[str, Any]]
"""Size and hash of files, by their path in the folder."""


def describe_share(folder: Path, rank: int, num_ranks: int) -> FileFacts:
    """Hash this rank's share of the files under ``folder``."""
    return {str(f.relative_to(folder)): _describe(f) for f in _files(folder)[rank::num_ranks]}


def write_manifest(folder: Path, facts: dict[str, Any], share: FileFacts, *, device: torch.device) -> None:
    """Write the manifest of files of which each rank has hashed its ``share``. Collective."""
    files: FileFacts = {}
    for part in gather_json(share, device=device):
        files.update(part)
    if dist.get_rank() == 0:
        text = json.dumps({**facts, "files": dict(sorted(files.items()))}, indent=1)
        _write_durably(folder / MANIFEST, text)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: There is none, or it is not a JSON object.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}; it is not a complete checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{folder / MANIFEST} holds no object with files")
    return manifest


def find_damage(folder: Path, *, rank: int = 0, num_ranks: int = 1) -> str | None:
    """What is wrong with this rank's share of the files, or ``None``."""
    try:
        files = read_manifest(folder)["files"]
    except CheckpointError as error:
        return str(error)
    for name, expected in list(files.items())[rank::num_ranks]:
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{file} has {file.stat().st_size} bytes instead of {expected['size']}"
        if _describe(file) != expected:
            return f"{file} does not match its hash"
    return None


def check_everywhere(folder: Path, *, device: torch.device) -> str | None:
    """What is wrong with the folder, checked by all ranks together; the same answer on every rank. Collective."""
    damage = find_damage(folder, rank=dist.get_rank(), num_ranks=dist.get_world_size())
    if not any_rank(damage is not None, device=device):
        return None
    return next(found for found in gather_json(damage, device=device) if found)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file() and f != folder / MANIFEST)


def _describe(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def _write_durably(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
