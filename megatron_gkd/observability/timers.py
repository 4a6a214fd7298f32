"""Wall-clock seconds of the stages of an iteration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_gkd.observability.metrics import Metrics


class Timers:
    """Adds up the seconds spent in named stages: ``with timers("teacher"): ...``.

    For one thread. Stages may lie inside each other; each counts its whole time.
    """

    def __init__(
        self, synchronize: Callable[[], None] | None = None, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Args: ``synchronize`` waits for the device, so that a stage pays for the work that it started."""
        self._synchronize = synchronize or (lambda: None)
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._running: set[str] = set()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the body, also when it raises.

        Raises:
            RuntimeError: The stage is already running: its seconds would count twice.
        """
        if name in self._running:
            raise RuntimeError(f"timer {name!r} is already running")
        self._synchronize()
        self._running.add(name)
        start = self._clock()
        try:
            yield
            self._synchronize()
        finally:
            self._running.discard(name)
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage since the last ``record``."""
        return dict(self._seconds)

    def record(self, metrics: Metrics) -> None:
        """Hand the seconds to ``metrics`` as ``time/<name>_s`` (the slowest rank counts) and start anew."""
        for name, seconds in self._seconds.items():
            metrics.add(f"time/{name}_s", seconds, unit="s", reduce="max")
        self._seconds = {}
