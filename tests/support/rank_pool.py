"""Gloo ranks that many tests use. They are forked from a server that has imported torch and Megatron once per session.

The ranks meet through a file, so no port can collide. A rank that fails or dies is named, and the pool
restarts, because the other ranks may still sit in a collective with it. The ranks share a hash seed, unlike those of a
job: an order that depends on it shows in the end-to-end tests only.
"""

import datetime
import gc
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

MAX_THREADS = 200
"""Of a rank. What tests leave behind adds up: two threads for each gloo group that is not destroyed."""

PRELOADED = "tests.support.rank_imports"


class RankPool:
    """``world_size`` processes joined in one gloo group, each with one thread and with Megatron made ready
    for CPU."""

    def __init__(self, world_size: int, timeout_s: float = 100.0):
        """Start the ranks; ``timeout_s`` is the longest one call may take (less than pytest's own limit)."""
        self.world_size = world_size
        self.timeout_s = timeout_s
        self._start()

    def run(self, fn: Callable[..., None], *args: Any) -> None:
        """Call ``fn(rank, world_size, *args)`` on every rank.

        Args:
            fn: A module-level function; the ranks import its module.
            args: Picklable values.

        Raises:
            AssertionError: A rank raised or died; holds the traceback of the first that was heard of.
            TimeoutError: Some ranks did not finish in time.
        """
        try:
            for pipe in self._pipes:
                # pytest may have added the folder of fn's module since the ranks started
                pipe.send(list(sys.path))
                pipe.send((fn, args))
        except BrokenPipeError:
            self._restart()
            raise AssertionError(f"one of {self.world_size} ranks died between two calls") from None
        pending = dict(zip(self._pipes, range(self.world_size), strict=True))
        while pending:
            ready = wait(list(pending), timeout=self.timeout_s)
            if not ready:
                self._restart()
                raise TimeoutError(
                    f"ranks {sorted(pending.values())} of {self.world_size} did not answer in {self.timeout_s:.0f} s"
                )
            for pipe in ready:
                assert isinstance(pipe, Connection)
                self._check_answer(pipe, pending.pop(pipe))
        if any(psutil.Process(process.pid).num_threads() > MAX_THREADS for process in self._processes):
            self._restart()

    def close(self) -> None:
        """Kill the ranks; they hold nothing worth a graceful end."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def _check_answer(self, pipe: Connection, rank: int) -> None:
        try:
            error = pipe.recv()
        except (EOFError, ConnectionResetError):
            error = "the process died"
        if error is not None:
            self._restart()
            raise AssertionError(f"rank {rank} of {self.world_size} failed:\n{error}")

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name, "store"))
        self._pipes: list[Connection] = []
        self._processes: list[ForkServerProcess] = []
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, store, theirs), daemon=True)
            process.start()
            theirs.close()  # otherwise the death of the rank would not close the pipe
            self._pipes.append(ours)
            self._processes.append(process)

    def _restart(self) -> None:
        self.close()
        self._start()


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    """Life of one rank: answer ``None`` or a traceback to every call."""
    import torch
    import torch.distributed as dist

    from megatron_gkd.platform.cpu import install

    install()  # before a test imports megatron
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays: the collections between the tests need not look at it
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    while True:
        try:
            sys.path[:] = pipe.recv()
            fn, args = pipe.recv()
        except EOFError:  # pytest ended
            return
        except BaseException:
            pipe.send(f"the test's module cannot be imported here:\n{traceback.format_exc()}")
            continue
        try:
            fn(rank, world_size, *args)
            gc.collect()  # its models lie in cycles and hold process groups with their threads
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())
