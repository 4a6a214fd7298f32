"""``status.json``: how a run stands, for scripts (torchrun's exit code says only 0 or 1)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from megatron_gkd.observability.files import replace_text

State = Literal["running", "done", "refused", "stopped", "failed"]
"""done: all iterations; refused: before training; stopped: by a signal or the stop file, saved; failed: by an error."""


@dataclass(frozen=True)
class Status:
    """Content of the file.

    Raises:
        ValueError: Unknown state.
    """

    state: State
    iteration: int
    """The last one finished; 0 before the first."""
    reason: str
    """Why, in a sentence; may be empty while running."""

    def __post_init__(self) -> None:
        if self.state not in get_args(State):
            raise ValueError(f"status state {self.state!r} is not one of {get_args(State)}")


class StatusFile:
    """Reads and writes ``<output_dir>/status.json``; a reader never sees half a file."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / "status.json"

    def write(self, state: State, iteration: int, reason: str = "") -> None:
        """Replace the file.

        Raises:
            ValueError: Unknown state; the file stays as it was.
        """
        replace_text(self.path, json.dumps(asdict(Status(state, iteration, reason))) + "\n")

    def read(self) -> Status | None:
        """The last status written, or ``None`` if there is none.

        Raises:
            ValueError: The file was not written by this class.
        """
        if not self.path.is_file():
            return None
        try:
            return Status(**json.loads(self.path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is not a status file: {error}") from error
