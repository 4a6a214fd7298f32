"""Start the training command as a user does, and read what it leaves behind."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.processes import ONE_THREAD, ROOT, run_python, wait_until


def _torchrun(config: Path, overrides: tuple[str, ...], num_ranks: int) -> list[str]:
    """The command that a user types, as arguments of Python."""
    return [
        "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks),
        str(ROOT / "launch" / "pretrain_gkd.py"), "--config", str(config), *overrides,
    ]  # fmt: skip


def run_torchrun(config: Path, *overrides: str, num_ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, whatever that is."""
    return run_python(*_torchrun(config, overrides, num_ranks))


def launch(
    config: Path, *overrides: str, num_ranks: int = 2, log_file: Path | None = None
) -> subprocess.Popen:
    """Start the command in a session of its own; its output goes to ``log_file``."""
    with (log_file or config.with_suffix(".log")).open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *_torchrun(config, overrides, num_ranks)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ONE_THREAD},
            start_new_session=True,
        )


def train(config: Path, *overrides: str, num_ranks: int = 2, timeout_s: float = 240.0) -> str:
    """Run the command to its end; returns its output.

    Raises:
        AssertionError: It failed; the message has its output.
    """
    log_file = config.with_suffix(".log")
    log_file.unlink(missing_ok=True)
    code = launch(config, *overrides, num_ranks=num_ranks, log_file=log_file).wait(timeout_s)
    output = log_file.read_text()
    assert code == 0, output[-5000:]
    return output


def wait_for_run(
    condition: Callable[[], object], process: subprocess.Popen, log_file: Path, timeout_s: float
) -> None:
    """Wait until ``condition`` holds while the launched ``process`` lives.

    Raises:
        AssertionError: It ended before, or the condition did not hold in time; the message has the end of its log.
    """

    def log_tail() -> str:
        return log_file.read_text()[-5000:]

    def is_met() -> bool:
        met = bool(condition())
        assert met or process.poll() is None, log_tail()
        return met

    wait_until(is_met, timeout_s, explain=log_tail)


def read_status(run: Path) -> dict[str, Any]:
    """``status.json``."""
    return json.loads((run / "status.json").read_text())


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; the last may be half-written while the run goes on, and is left out then."""
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
