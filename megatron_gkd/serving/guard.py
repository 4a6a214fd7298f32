"""Supervisor process of a server: python guard.py PARENT_PID GRACE_S COMMAND...

A server and its children must not outlive the trainer, even if the trainer is killed with SIGKILL, as torchrun does.
The trainer cannot set a parent-death signal itself: it fires when the *thread* that started the server ends, and code
between fork and exec is unsafe in a multi-threaded process. So the trainer starts this single-threaded process, which
uses the standard library only and
- polls its parent process id, which changes when the trainer dies, whatever the cause,
- has the kernel kill the server if this process is killed itself (PR_SET_PDEATHSIG),
- adopts orphaned grandchildren (PR_SET_CHILD_SUBREAPER), and kills and reaps them before it exits.

On SIGTERM or SIGINT it stops the server: SIGINT to the main process, SIGKILL to the process group after GRACE_S seconds.
The exit code is the server's, or 128 + n if signal n ended it. On other systems than Linux only the polling works.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# from linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.2
KILL_TIMEOUT_S = 10.0


def main(arguments: list[str]) -> int:
    """Run the command until it ends, the parent dies, or a stop signal arrives."""
    parent_pid, grace_s, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    is_stopping = False

    def stop(signum, frame):
        nonlocal is_stopping
        is_stopping = True

    # Handlers instead of SIG_IGN: ignored signals would stay ignored in the server after exec.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    guard_pid = os.getpid()
    # A session of its own: the whole group can be killed without killing the guard.
    server = subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: _die_with_parent(guard_pid))
    while _is_running(server, POLL_S):
        if os.getppid() != parent_pid:
            _log(f"process {parent_pid}, which started the server, is gone; killing the server")
            _signal_group(server.pid, signal.SIGKILL)
        elif is_stopping:
            _stop(server, parent_pid, grace_s)
    code = server.returncode
    _log(f"server process {server.pid} ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}")
    # The main process alone may have died: scheduler and detokenizer are processes of their own.
    _signal_group(server.pid, signal.SIGKILL)
    _reap_orphans()
    return 128 - code if code < 0 else code


def _stop(server: subprocess.Popen, parent_pid: int, grace_s: float) -> None:
    # sglang 0.5.23 exits 1.4 s after SIGINT but 7 s after SIGTERM. To the main process only: it treats signals to its
    # children as crashes.
    server.send_signal(signal.SIGINT)
    deadline = time.monotonic() + grace_s
    while _is_running(server, POLL_S) and time.monotonic() < deadline and os.getppid() == parent_pid:
        pass
    _signal_group(server.pid, signal.SIGKILL)
    server.wait()


def _is_running(server: subprocess.Popen, wait_s: float) -> bool:
    try:
        server.wait(wait_s)
    except subprocess.TimeoutExpired:
        return True
    return False


def _reap_orphans() -> None:
    """Kill and reap remaining descendants, including those outside the server's group."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return  # no children left
        if pid == 0:
            for child in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.02)  # killed children pass their own children on to this process
    _log(f"processes {_children()} did not end within {KILL_TIMEOUT_S:g} s after SIGKILL")


def _children() -> list[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def _signal_group(group: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signum)


def _die_with_parent(parent_pid: int) -> None:
    # Runs in the child between fork and exec.
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent ended before prctl took effect
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _log(message: str) -> None:
    sys.stderr.write(f"\nguard: {message}\n")  # leading newline: the server may have ended within a line
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
