"""``stop`` in the run folder: who writes it asks the run to save and end; scripts can, where signals do not reach."""

from __future__ import annotations

from pathlib import Path

MAX_REASON_CHARACTERS = 300


class StopFile:
    """``<output_dir>/stop``; its text, which may be empty, is the reason."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / "stop"

    def read(self) -> str | None:
        """Why to stop, in a sentence; ``None`` if there is no file."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        text = " ".join(text.split())[:MAX_REASON_CHARACTERS]
        return f"stopped by {self.path}" + (f": {text}" if text else "")

    def clear(self) -> None:
        """Remove the file: it was meant for an earlier start."""
        self.path.unlink(missing_ok=True)
