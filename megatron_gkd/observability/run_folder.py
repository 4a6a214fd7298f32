"""Files in the run folder that other processes read or write: ``run.lock``, ``status.json`` and ``stop``."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, get_args

from megatron_gkd.observability.files import replace_text

log = logging.getLogger(__name__)

POLL_S = 0.5
# an NFS server keeps the locks of a crashed client until its lease ends: 90 s by default on Linux
LEASE_S = 180.0
MAX_REASON_CHARACTERS = 300  # anyone may write the stop file, and its text goes into logs and status.json

State = Literal["running", "done", "refused", "stopped", "failed"]
"""done: all iterations; refused: before training; stopped: by a signal or the stop file, after saving; failed: error."""


class FolderInUseError(RuntimeError):
    """Another run uses the folder."""


class RunLock:
    """Lock on ``run.lock``, held from ``acquire`` until the process ends.

    Forked processes do not hold it.

    Args:
        output_dir: Run folder; created if missing.
    """

    # flock, not a pid file: the kernel releases it however the process ends

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / "run.lock"
        self._file: IO[str] | None = None

    def acquire(self, *, lease_s: float = LEASE_S) -> None:
        """Take the lock; without support by the file system only warn.

        Args:
            lease_s: How long to wait for a run on another host, whose lock may outlive a crash. A run on this host is
                refused at once.

        Raises:
            FolderInUseError: The folder is in use; the message names host and process.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # not "w", which would erase the owner's record before the lock is taken
        self._file = self.path.open("a+", encoding="utf-8")
        deadline, has_warned = time.monotonic() + lease_s, False
        while not self._is_taken():
            owner = self._read_owner()
            if owner.get("host") == socket.gethostname() or time.monotonic() >= deadline:
                self._file.close()
                raise FolderInUseError(
                    f"train.output_dir={str(self.path.parent)!r} is in use by {_named(owner)}; wait until that run has ended (stop it "
                    f"with: touch {self.path.parent}/stop), or name another folder"
                )
            if not has_warned:
                log.warning(
                    "%s is held by %s; waiting up to %.0f s for it to end", self.path, _named(owner), lease_s
                )
                has_warned = True
            time.sleep(POLL_S)
        # a flock belongs to the open file, which forked children (data workers, checkpoint writers) share
        os.register_at_fork(after_in_child=self._file.close)
        self._file.truncate(0)
        own = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "launch": _launch(),
        }
        self._file.write(json.dumps(own))
        self._file.flush()

    def is_of_this_launch(self) -> bool:
        """Whether the lock was last taken by a process of the same torchrun launch."""
        return self._read_owner().get("launch") == _launch()

    def _is_taken(self) -> bool:
        """Whether this process holds the lock now, or the file system supports none."""
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # ENOSYS or ENOLCK: Lustre mounted without flock
            log.warning("%s cannot be locked (%s): do not start a second run there", self.path, error)
        return True

    def _read_owner(self) -> dict[str, Any]:
        """The record of the last process that took the lock; empty without one."""
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}


def _named(owner: dict[str, Any]) -> str:
    """Description of the process that holds the lock, for messages."""
    if not owner.keys() >= {"host", "pid", "started"}:
        return "a run that starts at this moment"
    return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"


def _launch() -> list[str]:
    """Identifies a torchrun launch: equal on its ranks, different from any concurrent launch."""
    return [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")]


@dataclass(frozen=True)
class Status:
    """Content of ``status.json``.

    Raises:
        ValueError: Unknown state.
    """

    state: State
    iteration: int
    """The last completed iteration; 0 before the first."""
    reason: str
    """A sentence; may be empty while running."""

    def __post_init__(self) -> None:
        if self.state not in get_args(State):
            raise ValueError(f"status state {self.state!r} is not one of {get_args(State)}")


class StatusFile:
    """Reads and atomically replaces ``<output_dir>/status.json``."""

    # for scripts: torchrun's own exit code is only 0 or 1, whatever its workers returned (torch 2.13)

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / "status.json"

    def write(self, state: State, iteration: int, reason: str = "") -> None:
        """Replace the file.

        Raises:
            ValueError: Unknown state; the file is unchanged.
        """
        replace_text(self.path, json.dumps(asdict(Status(state, iteration, reason))) + "\n")

    def read(self) -> Status | None:
        """Read the file; ``None`` if it does not exist.

        Raises:
            ValueError: The file was not written by this class.
        """
        if not self.path.is_file():
            return None
        try:
            return Status(**json.loads(self.path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is not a status file: {error}") from error


class StopFile:
    """``<output_dir>/stop``: requests a save and a clean end; its text is the reason."""

    # signals reach a run only through torchrun, which kills its workers 30 s later

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / "stop"

    def read(self) -> str | None:
        """The reason to stop, or ``None`` if the file does not exist."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        # one line: line breaks could forge log records
        text = " ".join(text.split())[:MAX_REASON_CHARACTERS]
        return f"stopped by {self.path}" + (f": {text}" if text else "")

    def clear(self) -> None:
        """Remove the file of an earlier request."""
        self.path.unlink(missing_ok=True)
