"""The guard process, around commands that stand for a server. Around real SGLang: tests/e2e/test_sglang_server.py."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_gkd.serving import guard
from tests.support.processes import running, wait_until, wait_until_gone

# a server whose child has a session of its own, as a stubborn helper process might, and ignores SIGTERM
SERVER = """
import signal, subprocess, sys, time
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
print("up", flush=True)
time.sleep(60)
"""
# a trainer that starts the guard and is killed
TRAINER = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, sys.argv[1], str(os.getpid()), "5", *sys.argv[2:]])
time.sleep(60)
"""


def start_guard(*command: str, grace_s: float = 5.0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(grace_s), *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def descendants(pid: int, number: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return wait_until(
        lambda: found if len(found := process.children(recursive=True)) >= number else [], timeout_s=10
    )


@pytest.mark.parametrize(("code", "expected"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 128 + 9)])
def test_the_exit_code_is_the_servers(code, expected):
    process = start_guard(sys.executable, "-S", "-c", f"import os, sys; {code}")
    assert process.wait(10) == expected


@pytest.mark.parametrize("kind", ["orderly", "stubborn"])
def test_stopping_leaves_no_process_even_outside_the_group(kind):
    process = start_guard(sys.executable, "-S", "-c", SERVER, kind, grace_s=0.5)
    children = descendants(process.pid, 2)
    process.terminate()
    process.wait(10)
    assert not running(children)
    assert all(not child.is_running() for child in children), "the guard reaps what it adopts"


def test_a_killed_server_takes_its_children_along():
    process = start_guard(sys.executable, "-S", "-c", SERVER, "orderly")
    children = descendants(process.pid, 2)
    psutil.Process(process.pid).children()[0].kill()
    assert process.wait(10) == 128 + signal.SIGKILL
    assert not running(children)


def test_a_killed_guard_takes_the_server_along():
    process = start_guard(sys.executable, "-S", "-c", "import time; time.sleep(60)")
    children = descendants(process.pid, 1)
    process.kill()
    process.wait(10)
    wait_until_gone(children, timeout_s=10)


def test_nothing_survives_a_trainer_that_is_killed(tmp_path: Path):
    trainer = subprocess.Popen(
        [sys.executable, "-S", "-c", TRAINER, guard.__file__, sys.executable, "-S", "-c", SERVER, "stubborn"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children = descendants(trainer.pid, 3)
    trainer.kill()
    trainer.wait(10)
    wait_until_gone(children, timeout_s=10)
