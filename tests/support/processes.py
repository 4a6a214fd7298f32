"""Where the repository is, and how tests start Python, wait for a condition and see that a process is gone.

The training command: launching.py. Ranks of the pool: rank_pool.py.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

ROOT = Path(__file__).parents[2]

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Environment of processes that tests start: several run on few cores."""

T = TypeVar("T")


def run_python(
    *arguments: str | Path, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run this environment's Python in the repository root and capture its output as text.

    Args:
        arguments: Of the interpreter: ``"-c", code``, or a script with its arguments.
        env: Whole environment of the process; default: this one's with one thread.
        options: Further options of ``subprocess.run``.
    """
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **ONE_THREAD} if env is None else env,
        capture_output=True,
        text=True,
        **options,
    )


def wait_until(condition: Callable[[], T], timeout_s: float, *, explain: Callable[[], str] = str) -> T:
    """Poll ``condition`` until it is true; return its value.

    Raises:
        AssertionError: It was not within ``timeout_s``; the message ends with ``explain()``.
    """
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s: {explain()}"
        time.sleep(0.05)
    return result


def running(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still run. One that ended and was not collected by its parent (a zombie) does not."""
    return [process for process in processes if _is_running(process)]


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # ended between the two calls
        return False


def wait_until_gone(processes: Sequence[psutil.Process], timeout_s: float) -> None:
    """Wait until none of them runs."""
    wait_until(lambda: not running(processes), timeout_s, explain=lambda: f"still {running(processes)}")
