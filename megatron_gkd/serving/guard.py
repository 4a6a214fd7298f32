"""Runs a server so that nothing of it survives: python guard.py PARENT_PID GRACE_S COMMAND...

Neither a server nor its children may outlive the trainer, also when the trainer is killed with SIGKILL, as torchrun
does. A parent-death signal set by the trainer itself would not do: it fires when the *thread* that started the server
ends, and code between fork and exec is unsafe in a process with threads. So the trainer starts this single-threaded
process with the standard library only, which
- watches the trainer (its own parent changes when the trainer dies, whatever killed it),
- asks the kernel to kill the server if this process is killed itself (PR_SET_PDEATHSIG),
- adopts orphaned grandchildren (PR_SET_CHILD_SUBREAPER) and kills and reaps them before it ends.
On SIGTERM or SIGINT it stops the server: SIGINT to its main process (sglang 0.5.23 ends 1.4 s after it, 7 s after a
SIGTERM, and takes one to its children for a crash), SIGKILL to all of it after GRACE_S seconds. It exits with the
server's code, 128 + n if signal n ended it. Linux; elsewhere the kernel's help is missing, the watching remains.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.2
KILL_TIMEOUT_S = 10.0


def main(arguments: list[str]) -> int:
    """Run the command until it ends, the parent is gone, or a signal asks to stop."""
    parent_pid, grace_s, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    is_stopping = False

    def stop(signum, frame):
        nonlocal is_stopping
        is_stopping = True

    # handlers, unlike SIG_IGN, are not inherited by the server
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    guard_pid = os.getpid()
    server = subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: _die_with_parent(guard_pid))
    while _is_running(server, POLL_S):
        if os.getppid() != parent_pid:
            _say(f"process {parent_pid}, which started the server, is gone; killing the server")
            _signal_group(server.pid, signal.SIGKILL)
        elif is_stopping:
            _stop(server, parent_pid, grace_s)
    code = server.returncode
    _say(f"server process {server.pid} ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}")
    _signal_group(server.pid, signal.SIGKILL)
    _reap_orphans()
    return 128 - code if code < 0 else code


def _stop(server: subprocess.Popen, parent_pid: int, grace_s: float) -> None:
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
    """Kills and collects what the server left behind, processes outside its group included."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return  # none left
        if pid == 0:
            for child in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
    _say(f"processes {_children()} did not end within {KILL_TIMEOUT_S:g} s after SIGKILL")


def _children() -> list[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def _signal_group(group: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signum)


def _die_with_parent(parent_pid: int) -> None:
    """In the child before exec: SIGKILL when the parent's only thread ends."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the line above
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _say(message: str) -> None:
    sys.stderr.write(f"\nguard: {message}\n")  # the server may have stopped in mid-line
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
