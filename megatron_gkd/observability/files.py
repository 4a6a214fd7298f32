"""Files that survive a kill: append-only JSON lines, and atomically replaced text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """A file with one JSON object per line, each with the key ``iteration``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None

    def append(self, value: Mapping[str, Any]) -> None:
        """Append one line and flush.

        Raises:
            ValueError: The object contains NaN or infinity, which JSON has no literal for.
        """
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_text(self._path, "a")
        self._file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, iteration: int) -> None:
        """Move lines of later iterations and truncated lines to ``<name>.superseded.jsonl``."""
        self.close()
        if not self._path.is_file():
            return
        kept, superseded = [], []
        # bytes, because str.splitlines also splits at U+2028 and others, which are legal inside JSON strings
        for line in self._path.read_bytes().splitlines(keepends=True):
            found = _parse_line(line)
            if found is None:
                superseded.append(json.dumps({"torn": line.decode("utf-8", "backslashreplace")}) + "\n")
            elif found > iteration:
                superseded.append(line.decode())
            else:
                kept.append(line.decode())
        if superseded:
            # copy before cutting: a kill in between duplicates lines instead of losing them
            with _open_text(self._path.with_suffix(".superseded.jsonl"), "a") as file:
                file.writelines(superseded)
                file.flush()
                os.fsync(file.fileno())
            replace_text(self._path, "".join(kept))

    def close(self) -> None:
        """Close the file; the next ``append`` reopens it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _parse_line(line: bytes) -> int | None:
    """The line's iteration, ``None`` for a truncated or foreign line."""
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return None


def _open_text(path: Path, mode: str) -> Any:
    # a lone surrogate, which a cut byte-level BPE token can decode to, becomes a JSON escape instead of an error
    return path.open(mode, encoding="utf-8", errors="backslashreplace", newline="\n")


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically: readers see the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # the process id keeps writers on one host apart
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with _open_text(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(
            file.fileno()
        )  # rename does not order the data: after a power loss the new file could be empty
    aside.replace(path)
