"""``run.lock`` in the run folder: one run at a time writes there."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

POLL_S = 0.5
# a file server keeps the locks of a machine that broke down until its lease ends: 90 s by default on Linux
LEASE_S = 180.0


class FolderInUseError(RuntimeError):
    """Another run writes to the folder."""


class RunLock:
    """Held by one process of a run from ``acquire`` to its end, however it ends. Processes forked from it do not hold it.

    Args:
        output_dir: Folder of the run; made if it is not there.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / "run.lock"
        self._file: IO[str] | None = None

    def acquire(self, *, lease_s: float = LEASE_S) -> None:
        """Keep other runs out. A file system that knows no locks gives a warning.

        Args:
            lease_s: How long to wait for another machine's run, which may have broken down; one of this machine is not waited for.

        Raises:
            FolderInUseError: Names the other run's machine and process.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
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
        """Whether a process that torchrun started together with this one was the last to hold the lock."""
        return self._read_owner().get("launch") == _launch()

    def _is_taken(self) -> bool:
        """Whether this process has the lock now, or nobody can have it."""
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            log.warning("%s cannot be locked (%s): do not start a second run there", self.path, error)
        return True

    def _read_owner(self) -> dict[str, Any]:
        """What the last process that took the lock wrote; empty where none has, or one is about to."""
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}


def _named(owner: dict[str, Any]) -> str:
    """A phrase for the process that holds the lock."""
    if not owner.keys() >= {"host", "pid", "started"}:
        return "a run that starts at this moment"
    return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"


def _launch() -> list[str]:
    """Equal on all ranks of a launch, and on no other one that runs at the same time."""
    return [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")]
