"""The device of a stage, its problem sizes, and clocks and memory counters on it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """A CUDA device with the sizes of a real model, or the CPU with small ones."""

    is_smoke: bool

    @cached_property
    def device(self) -> torch.device:
        """``cuda``, or ``cpu`` in a smoke run.

        Raises:
            RuntimeError: There is no CUDA device.
        """
        if self.is_smoke:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device is visible; --smoke runs every stage on the CPU")
        return torch.device("cuda")

    @property
    def vocab_size(self) -> int:
        """Columns of Qwen's output layer, a multiple of 128."""
        return 3000 if self.is_smoke else 151_936

    @property
    def odd_vocab_size(self) -> int:
        """Entries of Qwen's tokenizer: an odd number, so rows of that length are not aligned."""
        return self.vocab_size - 293

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers on the device."""
        return torch.randn(shape, device=self.device).to(dtype)

    def synchronize(self) -> None:
        """Wait for the work queued on the device."""
        if not self.is_smoke:
            torch.cuda.synchronize()

    def median_ms(self, run: Callable[[], Any], *, repeats: int, warmup: int = 1) -> float:
        """Median wall time of ``run``, each call synchronized."""
        if self.is_smoke:
            repeats, warmup = 1, 0
        for _ in range(warmup):
            run()
        times = []
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
        return median(times)

    def peak_gib(self, run: Callable[[], Any]) -> float:
        """Peak of allocated device memory during ``run``, beyond that before it; NaN on a CPU."""
        if self.is_smoke:
            run()
            return float("nan")
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / GIB
