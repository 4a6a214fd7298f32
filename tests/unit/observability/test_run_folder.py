"""The lock, ``status.json`` and the stop file of a run folder."""

import contextlib
import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from megatron_gkd.observability import StopFile, run_folder
from megatron_gkd.observability.run_folder import (
    MAX_REASON_CHARACTERS,
    FolderInUseError,
    RunLock,
    Status,
    StatusFile,
)
from tests.support.processes import ROOT, wait_until

HOLD = """
import os, pathlib, sys, time
from megatron_gkd.observability.run_folder import RunLock

lock = RunLock(pathlib.Path(sys.argv[1]))
lock.acquire()
if "fork" in sys.argv and os.fork() == 0:
    time.sleep(60)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holding(folder, *words):
    """A process that holds the lock of the folder, with a forked child for the word ``fork``; a group of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder, *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def other_run(tmp_path):
    """A process that holds the lock of ``tmp_path / 'run'``."""
    with holding(tmp_path / "run") as process:
        yield process


def test_a_second_run_on_this_machine_is_refused_at_once_naming_the_first(tmp_path, other_run):
    with pytest.raises(FolderInUseError) as refusal:
        RunLock(tmp_path / "run").acquire(lease_s=1e6)
    message = str(refusal.value)
    assert f"train.output_dir={str(tmp_path / 'run')!r}" in message
    assert f"process {other_run.pid} on {socket.gethostname()}" in message
    assert f"touch {tmp_path}/run/stop" in message


def test_the_folder_is_free_when_its_run_was_killed(tmp_path, other_run):
    other_run.kill()
    other_run.wait()
    lock = RunLock(tmp_path / "run")
    lock.acquire(lease_s=0)
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()


def test_the_lease_of_another_machine_is_waited_for(tmp_path, other_run, monkeypatch, caplog):
    monkeypatch.setattr(run_folder, "POLL_S", 0.01)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "node-2")
        with pytest.raises(FolderInUseError):
            RunLock(tmp_path / "run").acquire(lease_s=0.4)
        assert caplog.text.count("waiting up to 0 s") == 1, "said once"
        elsewhere.setattr(run_folder.time, "sleep", lambda _: (other_run.kill(), other_run.wait()))
        lock = RunLock(tmp_path / "run")
        lock.acquire(lease_s=60)
    assert json.loads(lock.path.read_text())["host"] == "node-2"


def test_a_run_that_has_not_said_who_it_is_is_waited_for(tmp_path, other_run):
    (tmp_path / "run" / "run.lock").write_text("")
    with pytest.raises(FolderInUseError, match="a run that starts at this moment"):
        RunLock(tmp_path / "run").acquire(lease_s=0)


def test_a_forked_process_does_not_keep_the_folder(tmp_path):
    with holding(tmp_path / "run", "fork") as process:
        process.kill()
        process.wait()
        acquire_within(RunLock(tmp_path / "run"), 10)  # the forked process may not have run yet


def acquire_within(lock, timeout_s):
    def is_acquired():
        try:
            lock.acquire()
        except FolderInUseError:
            return False
        return True

    wait_until(is_acquired, timeout_s)


def test_ranks_of_one_launch_know_the_lock_of_theirs(tmp_path, monkeypatch):
    lock = RunLock(tmp_path)
    assert not lock.is_of_this_launch(), "nobody holds it yet"
    monkeypatch.setenv("MASTER_PORT", "29511")
    lock.acquire()
    assert RunLock(tmp_path).is_of_this_launch()
    monkeypatch.setenv("MASTER_PORT", "29512")
    assert not RunLock(tmp_path).is_of_this_launch()


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING):
        RunLock(tmp_path).acquire()
    assert "cannot be locked ([Errno 37] No locks available)" in caplog.text


def test_written_status_is_read_back_and_has_the_documented_keys(tmp_path):
    file = StatusFile(tmp_path / "run")
    assert file.read() is None
    file.write("running", 3)
    file.write("failed", 4, "rollout: the server died")
    assert file.read() == Status("failed", 4, "rollout: the server died")
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {
        "state": "failed", "iteration": 4, "reason": "rollout: the server died",
    }  # fmt: skip


def test_unknown_state_is_refused_and_leaves_the_file(tmp_path):
    file = StatusFile(tmp_path)
    file.write("done", 9)
    with pytest.raises(ValueError, match="'finished' is not one of"):
        file.write("finished", 10)
    assert file.read() == Status("done", 9, "")


def test_failed_write_leaves_the_old_status(tmp_path, monkeypatch):
    file = StatusFile(tmp_path)
    file.write("running", 1)

    def disk_full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="no space left"):
        file.write("running", 2)
    assert file.read() == Status("running", 1, "")


def test_reader_never_sees_half_a_file(tmp_path):
    file = StatusFile(tmp_path)
    file.write("running", 0)
    has_ended = threading.Event()

    def write():
        for iteration in range(100):
            file.write("running", iteration, "x" * 20_000)
        has_ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not has_ended.is_set():
        assert file.read() is not None  # raises on a part of a file
    writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"state": "done"}', '{"state": "?", "iteration": 1, "reason": ""}']
)
def test_foreign_file_is_refused(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(ValueError, match="is not a status file"):
        StatusFile(tmp_path).read()


def test_the_text_of_the_file_is_the_reason(tmp_path):
    file = StopFile(tmp_path)
    assert file.read() is None
    file.path.touch()
    assert file.read() == f"stopped by {tmp_path}/stop"
    file.path.write_bytes(b"disk\n is full \xff" + b"x" * 10_000)
    assert file.read().startswith(f"stopped by {tmp_path}/stop: disk is full ")
    assert len(file.read()) < len(str(file.path)) + MAX_REASON_CHARACTERS + 20


def test_an_old_file_is_removed_and_a_missing_one_is_fine(tmp_path):
    file = StopFile(tmp_path)
    file.path.touch()
    file.clear()
    file.clear()
    assert file.read() is None
