"""The queue through which the processes that write a checkpoint answer; it survives a request to stop the run.

torchrun hands SIGTERM to the whole process group of a rank. Megatron-Core keeps this queue in a process of its own which
SIGTERM would end, and with it the checkpoint that is being written and the last one of the run.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager


def keep_results_through_signals() -> None:
    """Start the queue's process, deaf to SIGTERM and SIGINT, unless this process has a queue; it ends with this process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = start_manager().Queue()


def start_manager() -> SyncManager:
    """A manager whose process outlives SIGTERM and SIGINT, but not the process that started it."""
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    resource_tracker.ensure_running()  # unblocks both signals where it has to start
    with _blocked_signals():
        manager.start(_end_with_parent)
    return manager


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Signals of this time arrive afterwards; processes started in it keep them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
