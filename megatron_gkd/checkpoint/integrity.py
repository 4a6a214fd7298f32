"""Manifests of checkpoint folders: file sizes and SHA-256 hashes.

The manifest is written last, and the folder is renamed after it, so a partially written checkpoint has neither.
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
_READ_BYTES = 1 << 22

# size and hash by path relative to the folder
FileDigests = dict[str, dict[str, Any]]


class CheckpointError(RuntimeError):
    """An unusable checkpoint; the message names the folder and the reason."""


def hash_share(folder: Path, rank: int, num_ranks: int) -> FileDigests:
    """Hash this rank's share of the files in ``folder``."""
    # Round robin over sorted names: shards of a rank have similar sizes and names, so the shares are of similar size.
    return {str(f.relative_to(folder)): _digest(f) for f in _files(folder)[rank::num_ranks]}


def write_manifest(folder: Path, header: dict[str, Any], share: FileDigests, *, device: torch.device) -> None:
    """Merge the ranks' digests and write the manifest with ``header``. Collective."""
    files: FileDigests = {}
    for part in gather_json(share, device=device):
        files.update(part)
    if dist.get_rank() == 0:
        text = json.dumps({**header, "files": dict(sorted(files.items()))}, indent=1)
        _write_durably(folder / MANIFEST, text)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointError: The manifest is missing or not a JSON object.
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
    """Return the first mismatch in this rank's share of the files, or ``None``."""
    try:
        files = read_manifest(folder)["files"]
    except CheckpointError as error:
        return str(error)
    for name, expected in list(files.items())[rank::num_ranks]:
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != expected["size"]:  # saves hashing a truncated file
            return f"{file} has {file.stat().st_size} bytes instead of {expected['size']}"
        if _digest(file) != expected:
            return f"{file} does not match its hash"
    return None


def find_damage_on_any_rank(folder: Path, *, device: torch.device) -> str | None:
    """Verify a checkpoint with all ranks; return the first mismatch on every rank. Collective."""
    damage = find_damage(folder, rank=dist.get_rank(), num_ranks=dist.get_world_size())
    # One small all-reduce in the usual case; messages are gathered only if there is one.
    if not any_rank(damage is not None, device=device):
        return None
    return next(found for found in gather_json(damage, device=device) if found)


def sync_folder(folder: Path) -> None:
    """Flush renames and new entries of ``folder`` to disk."""
    # fsync of a file does not cover its directory entry.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file() and f != folder / MANIFEST)


def _digest(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def _write_durably(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
