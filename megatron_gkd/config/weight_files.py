"""Completeness of model files from names, sizes and headers, without torch or reading weights."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
GIB = 2**30


def find_hf_problems(folder: Path) -> Iterator[str]:
    """Missing or truncated safetensors files of a Hugging Face folder."""
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            yield f"{folder / INDEX} cannot be read ({type(error).__name__}: {error}); download the model again"
            return
    elif (folder / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    else:
        yield f"there is no {SINGLE_FILE} and no {INDEX} in {folder}; weights are read from safetensors files only"
        return
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        yield f"{len(missing)} of {len(names)} weight files are missing, first {folder / missing[0]}; download the model again"
    for name in names:
        if name not in missing and (problem := _find_damage(folder / name)):
            yield problem


def find_checkpoint_problems(folder: Path) -> Iterator[str]:
    """Missing or truncated files of a checkpoint; their hashes are verified on loading."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        sizes = {name: int(facts["size"]) for name, facts in files.items()}
    except FileNotFoundError:
        yield f"there is no {MANIFEST} in {folder}: the checkpoint was not finished; use another one or convert again"
        return
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        yield f"{folder / MANIFEST} cannot be read ({type(error).__name__}: {error}); use another checkpoint"
        return
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            yield f"{file} {state}: the checkpoint is damaged; use another one or convert again"
            return


def find_output_problems(folder: Path, needed_bytes: int) -> Iterator[str]:
    """Why ``needed_bytes`` cannot be written to ``folder``, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        yield f"{existing} is a file; choose a folder"
        return
    if not os.access(existing, os.W_OK | os.X_OK):
        yield f"{existing} is not writable; choose another folder or change its permissions"
        return
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        yield (
            f"{existing} has {free / GIB:.1f} GiB free and one checkpoint of the student takes about "
            f"{needed_bytes / GIB:.1f} GiB; free space or choose another folder"
        )


def _find_damage(file: Path) -> str | None:
    """Compare the size of a safetensors file with the end of the data in its header."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size - 8:
                return f"{file} is cut off in its header; download the model again"
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        return f"{file} is no safetensors file ({type(error).__name__}: {error}); download the model again"
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        return f"{file} has {size} bytes instead of {expected}; download the model again"
    return None
