"""What becomes of the queue's process when signals reach the whole process group, and when its owner is killed."""

import contextlib

import psutil

from tests.support.processes import ROOT, run_python, wait_until_gone

# the signals begin before the process is there and go on while it starts
UNDER_SIGNALS = """
import itertools, os, signal, threading, time
from megatron_gkd.checkpoint.results_queue import start_manager

if __name__ == "__main__":
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: caught.append(number))

    def send():
        for number in itertools.cycle((signal.SIGTERM, signal.SIGINT)):
            os.killpg(0, number)
            time.sleep(0.01)

    threading.Thread(target=send, daemon=True).start()
    queue = start_manager().Queue()
    num_caught = len(caught)
    assert num_caught > 0, "signals that arrive meanwhile are not lost"
    time.sleep(0.5)
    assert len(caught) > num_caught, "nor later ones"
    queue.put("written")
    print(queue.get(), queue._manager._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_process_outlives_signals_but_not_its_owner(tmp_path):
    script = tmp_path / "owner.py"
    script.write_text(UNDER_SIGNALS)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    owner = run_python(script, env=environment, start_new_session=True, timeout=60)
    assert owner.stdout.startswith("written "), owner.stderr
    pid = int(owner.stdout.split()[1])
    with contextlib.suppress(psutil.NoSuchProcess):
        wait_until_gone([psutil.Process(pid)], timeout_s=10)
