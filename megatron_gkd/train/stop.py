"""Stopping in order: a signal or the stop file, noticed by any rank, ends the run on all of them between iterations."""

import signal
from pathlib import Path

import torch

from megatron_gkd.observability.run_folder import StopFile
from megatron_gkd.parallel.collectives import any_rank, gather_json


class StopRequest:
    """Notes SIGTERM, SIGINT and the stop file of a run.

    Args:
        output_dir: Folder of the run.

    Attributes:
        reason: Why the ranks agreed to stop; empty while they did not.
    """

    def __init__(self, output_dir: Path) -> None:
        self.reason = ""
        self._file = StopFile(output_dir)
        self._signal_name: str | None = None

    def listen(self) -> None:
        """Install the handlers; a second signal of a kind ends the process at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def is_agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; the same answer and reason on every rank. Collective."""
        own = f"stopped by {self._signal_name}" if self._signal_name else self._file.read()
        if not any_rank(own is not None, device=device):
            return False
        self.reason = next(reason for reason in gather_json(own, device=device) if reason is not None)
        return True

    def _note(self, number: int, _frame) -> None:
        self._signal_name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
