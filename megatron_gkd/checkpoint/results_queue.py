"""The results queue of Megatron's checkpoint writers, protected from the signals that stop a run.

torchrun sends SIGTERM to the whole process group of a rank. Megatron-Core (0.16.1, filesystem_async.py:54) keeps the queue in
a manager process, which SIGTERM would end: the save in progress and the last save of the run would fail.

A file of its own without torch, because the spawned manager process imports it to find ``_end_with_parent``.
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
    """Start the manager of the results queue with SIGTERM and SIGINT blocked, once per process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = start_manager().Queue()


def start_manager() -> SyncManager:
    """Start a manager process that ignores SIGTERM and SIGINT and ends with its parent."""
    # As in Megatron: a process forked from a rank would inherit CUDA and its threads' locks.
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    # Started before the signals are blocked: its start unblocks both of them in this thread.
    resource_tracker.ensure_running()
    with _blocked_signals():
        manager.start(_end_with_parent)
    return manager


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Defer signals to the end of the block; processes started in it inherit the mask."""
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
    os._exit(0)  # from a thread: sys.exit would end this thread only
