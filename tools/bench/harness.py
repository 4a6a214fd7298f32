"""What the benches share: ranks, clocks, counted memory and bytes, gates, and the refusal to measure on a busy machine."""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = 2


class Gate(NamedTuple):
    """A number and the bound that it has to keep."""

    name: str
    value: float
    bound: float
    sense: str  # ">=" or "<="

    @property
    def is_kept(self) -> bool:
        """Whether the value is on the right side; NaN is not."""
        return self.value >= self.bound if self.sense == ">=" else self.value <= self.bound


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """With the options of every bench."""
    parser = argparse.ArgumentParser(prog=name, description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and gates")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (png); needs matplotlib")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved calls of each contender")
    parser.add_argument("--force", action="store_true", help="measure although the machine is busy")
    return parser


def refuse_if_busy(force: bool) -> None:
    """End the process with code 2 if more processes want to run than there are cores."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores and not force:
        sys.stderr.write(
            f"refused: the load average is {load:.1f} on {cores} cores, so times would say nothing; wait, or use --force\n"
        )
        raise SystemExit(REFUSED)


def on_ranks(tp_size: int, measure: Callable[..., list[dict[str, Any]]], *args: Any) -> list[dict[str, Any]]:
    """What rank 0 of ``measure(rank, tp_size, *args)`` returns; ranks are processes with one thread in a gloo group."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts and stops
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        places = [(rank, tp_size, folder, measure, args) for rank in range(tp_size)]
        processes = [context.Process(target=_rank, args=place) for place in places]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"a rank failed: exit codes {[process.exitcode for process in processes]}")
        return json.loads(Path(folder, "rows.json").read_text())


def _rank(rank: int, tp_size: int, folder: str, measure: Callable[..., Any], args: tuple[Any, ...]) -> None:
    from megatron_gkd.platform.device import prepare_process

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore", module=r"(modelopt|torch|transformers)\b.*")
    torch.set_num_threads(1)
    prepare_process()
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=tp_size)
    rows = measure(rank, tp_size, *args)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


class Times(NamedTuple):
    """Of one call on this rank, in milliseconds."""

    cpu_ms: float
    wall_ms: float


def timed(call: Callable[[], Any]) -> Times:
    """Run ``call`` when all ranks are there. CPU time is that of all threads of this process."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Times((time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Largest sum of allocations of torch's CPU allocator that live at the same time, beyond those before ``call``."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    kineto = profiler.profiler
    assert kineto is not None
    assert kineto.kineto_results is not None
    events = sorted(kineto.kineto_results.events(), key=lambda event: event.start_ns())
    current = peak = 0
    for event in events:
        if event.name() == "[memory]":
            current += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, current)
    return peak


class SentBytes(TorchDispatchMode):
    """``with SentBytes() as sent``: ``sent.total`` is what this rank contributes to all collectives."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.total += min((tensor.nbytes for tensor in tensors), default=0)
        return func(*args, **kwargs)


def finish(rows: Sequence[dict[str, Any]], gates: Sequence[Gate], json_file: Path | None) -> int:
    """Print the gates, write the file; the exit code."""
    for gate in gates:
        verdict = "" if gate.is_kept else "   MISSED"
        sys.stdout.write(f"{gate.name:26} {gate.value:10.4g}  {gate.sense} {gate.bound:g}{verdict}\n")
    if json_file is not None:
        content = {"rows": list(rows), "gates": [gate._asdict() for gate in gates]}
        json_file.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(gate.is_kept for gate in gates) else 1


def table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as text; ``columns`` maps keys to format specifications."""
    cells = [list(columns)]
    cells += [
        ["" if row.get(key) is None else format(row[key], spec) for key, spec in columns.items()]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(line.rstrip() for line in lines) + "\n"
