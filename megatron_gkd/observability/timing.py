"""Stage timers of an iteration, and the progress line of a run."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_gkd.observability.metrics import Metrics


class Timers:
    """Accumulates wall-clock seconds of named stages: ``with timers("teacher"): ...``.

    Not thread-safe. Stages may be nested; an outer stage includes its inner ones.

    Args:
        synchronize: Waits for the device, so that a stage is charged for the kernels it launched.
        clock: Returns seconds.
    """

    def __init__(
        self, synchronize: Callable[[], None] | None = None, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._synchronize = synchronize or (lambda: None)
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._running: set[str] = set()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the body, also if it raises.

        Raises:
            RuntimeError: The stage is already running; its seconds would be counted twice.
        """
        # recursion would add the inner time twice
        if name in self._running:
            raise RuntimeError(f"timer {name!r} is already running")
        self._synchronize()
        self._running.add(name)
        start = self._clock()
        try:
            yield
            self._synchronize()  # not in ``finally``: after an error the device may never become idle
        finally:
            self._running.discard(name)
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage since the last ``record``."""
        return dict(self._seconds)

    def record(self, metrics: Metrics) -> None:
        """Add the seconds to ``metrics`` as ``time/<name>_s`` (maximum over ranks) and reset the timers."""
        for name, seconds in self._seconds.items():
            metrics.add(f"time/{name}_s", seconds, unit="s", reduce="max")
        self._seconds = {}


def progress_line(
    iteration: int, total: int, loss: float, lag: int, tokens_per_s: float, seconds_left: float | None
) -> str:
    """Format the progress line of an iteration.

    Example: ``iteration 12/40 | loss 1.234 | lag 0 | 213 tok/s | 3 min 10 s left``.

    Args:
        iteration: The iteration just completed, from 1.
        total: Iterations of the whole run.
        loss: Nats per token.
        lag: Weight versions between the student that generated the samples and the student that is trained on them.
        tokens_per_s: Trained tokens per second.
        seconds_left: Estimate, ``None`` if unknown.
    """
    left = "time left unknown" if seconds_left is None else f"{format_duration(seconds_left)} left"
    return f"iteration {iteration}/{total} | loss {loss:.3f} | lag {lag} | {tokens_per_s:.0f} tok/s | {left}"


def format_duration(seconds: float) -> str:
    """Format seconds in the two largest units, such as ``3 min 10 s``."""
    whole = max(0, round(seconds))
    minutes, s = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    if hours:
        return f"{hour} h {minute} min"
    return f"{minute} min {s} s" if minutes else f"{s} s"


class Progress:
    """Measures iterations and estimates the remaining time from the median of the latest."""

    # the median, because the first iteration compiles and some iterations save a checkpoint or validate

    def __init__(self, total: int, *, window: int = 20, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._durations_s: deque[float] = deque(maxlen=window)
        self._last = clock()

    def seconds_left(self, iteration: int) -> float | None:
        """Estimated seconds after ``iteration``; ``None`` before the first ``finish``."""
        if not self._durations_s:
            return None
        return statistics.median(self._durations_s) * max(0, self._total - iteration)

    def finish(self, iteration: int, *, loss: float, lag: int, num_tokens: int) -> str:
        """Record the end of an iteration and return its progress line.

        Args:
            iteration: From 1.
            loss: Nats per token.
            lag: See ``progress_line``.
            num_tokens: Tokens trained on since the last call, or since construction.
        """
        now = self._clock()
        seconds, self._last = now - self._last, now
        self._durations_s.append(seconds)
        tokens_per_s = num_tokens / seconds if seconds > 0 else 0.0
        return progress_line(iteration, self._total, loss, lag, tokens_per_s, self.seconds_left(iteration))
