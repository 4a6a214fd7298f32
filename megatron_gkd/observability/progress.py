"""The progress line: where the run is, how fast it goes, when it ends."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable


def progress_line(
    iteration: int, total: int, loss: float, lag: int, tokens_per_s: float, seconds_left: float | None
) -> str:
    """One line, for example ``iteration 12/40 | loss 1.234 | lag 0 | 213 tok/s | 3 min 10 s left``.

    Args:
        iteration: The one just finished, from 1.
        total: Iterations of the whole run.
        loss: Nats per token.
        lag: Weight versions between the student that wrote the samples and the one that learned from them.
        tokens_per_s: Tokens trained on per second.
        seconds_left: Estimate, or ``None`` if there is none yet.
    """
    left = "time left unknown" if seconds_left is None else f"{format_duration(seconds_left)} left"
    return f"iteration {iteration}/{total} | loss {loss:.3f} | lag {lag} | {tokens_per_s:.0f} tok/s | {left}"


def format_duration(seconds: float) -> str:
    """Two largest units: ``42 s``, ``3 min 10 s``, ``2 h 5 min``, ``1 d 3 h``."""
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
    """Measures iterations and estimates the time left from the median of the last ones.

    The median keeps a slow first iteration or a save from spoiling the estimate.
    """

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
        """Note that an iteration ended now, and return its progress line.

        Args:
            iteration: From 1.
            loss: Nats per token.
            lag: See ``progress_line``.
            num_tokens: Tokens trained on since the last call (or since construction).
        """
        now = self._clock()
        seconds, self._last = now - self._last, now
        self._durations_s.append(seconds)
        tokens_per_s = num_tokens / seconds if seconds > 0 else 0.0
        return progress_line(iteration, self._total, loss, lag, tokens_per_s, self.seconds_left(iteration))
