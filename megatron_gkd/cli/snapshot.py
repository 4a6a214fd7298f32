"""A copy of the code, so that later edits do not reach a job that waits in a queue."""

import fnmatch
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

MAX_BYTES = 256 * 2**20
NUM_SHOWN = 3


def copy_code(source: Path, target: Path, *, excludes: Sequence[str], output_dir: Path) -> int:
    """Copy ``source`` into the new folder ``target``.

    Links to folders are kept as links, so what they lead to is not copied.

    Args:
        source: Folder with the code.
        target: Made; may lie under ``source`` if ``output_dir`` contains it.
        excludes: See ``runtime.excludes``.
        output_dir: Of the run; never copied.

    Returns:
        Number of files copied.

    Raises:
        ValueError: More than ``MAX_BYTES`` would be copied; names the largest files.
    """
    files = list(_find_files(source, excludes, output_dir.resolve()))
    _check_size(files, source)
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():  # a link to it
            copy.symlink_to(file.resolve())
        else:
            shutil.copy2(file, copy)
    return len(files)


def is_excluded(path: PurePath, *, is_folder: bool, patterns: Sequence[str]) -> bool:
    """Whether a pattern of ``runtime.excludes`` matches ``path``, which is relative to the folder of the code."""
    for pattern in patterns:
        if pattern.endswith("/") and not is_folder:
            continue
        candidate = path.as_posix() if pattern.startswith("/") else path.name
        if fnmatch.fnmatchcase(candidate, pattern.strip("/")):
            return True
    return False


def _find_files(source: Path, patterns: Sequence[str], output_dir: Path) -> Iterator[Path]:
    """Files and links to folders; folders that are left out are not entered."""
    for place, folders, files in os.walk(source):
        kept = []
        for name in sorted(folders):
            folder = Path(place, name)
            if folder.resolve() == output_dir:
                continue
            if is_excluded(folder.relative_to(source), is_folder=True, patterns=patterns):
                continue
            if folder.is_symlink():
                yield folder
            kept.append(name)
        folders[:] = kept
        for name in sorted(files):
            file = Path(place, name)
            if file.is_file() and not is_excluded(
                file.relative_to(source), is_folder=False, patterns=patterns
            ):
                yield file


def _check_size(files: Sequence[Path], source: Path) -> None:
    sizes = {file: file.stat().st_size for file in files if file.is_file()}
    total = sum(sizes.values())
    if total <= MAX_BYTES:
        return
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:NUM_SHOWN]
    shown = ", ".join(f"{file.relative_to(source)} ({sizes[file] / 2**20:.0f} MiB)" for file in largest)
    raise ValueError(
        f"the code in {source} takes {total / 2**20:.0f} MiB, at most {MAX_BYTES / 2**20:.0f} are copied; add what "
        f"is no code to runtime.excludes; the largest files: {shown}"
    )
