"""Files that survive a kill: JSON lines that are only appended to, and texts replaced as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """A file of JSON objects, one a line, each with the key ``iteration``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None

    def append(self, value: Mapping[str, Any]) -> None:
        """Write one line and flush it.

        Raises:
            ValueError: The object holds NaN or infinity, which JSON cannot express.
        """
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_text(self._path, "a")
        self._file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, iteration: int) -> None:
        """Move lines of later iterations, and torn ones, to ``<name>.superseded.jsonl``."""
        self.close()
        if not self._path.is_file():
            return
        kept, superseded = [], []
        for line in self._path.read_bytes().splitlines(keepends=True):
            found = _parse_line(line)
            if found is None:
                superseded.append(json.dumps({"torn": line.decode("utf-8", "backslashreplace")}) + "\n")
            elif found > iteration:
                superseded.append(line.decode())
            else:
                kept.append(line.decode())
        if superseded:
            # first the copy, then the cut: a kill in between leaves a line twice, never nowhere
            with _open_text(self._path.with_suffix(".superseded.jsonl"), "a") as file:
                file.writelines(superseded)
                file.flush()
                os.fsync(file.fileno())
            replace_text(self._path, "".join(kept))

    def close(self) -> None:
        """Close the file; a later ``append`` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _parse_line(line: bytes) -> int | None:
    """The line's iteration, or None if it is no complete line of ours."""
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return None


def _open_text(path: Path, mode: str) -> Any:
    # half a surrogate pair becomes a JSON escape instead of an error
    return path.open(mode, encoding="utf-8", errors="backslashreplace", newline="\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with _open_text(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
