"""Check the package on one GPU: numbers against float64, a training run, time and memory.

    python tools/gpu_check.py                           all stages
    python tools/gpu_check.py --stages products dense   some of them
    python tools/gpu_check.py --smoke                   all stages, small, on the CPU

docs/gpu.md describes the stages. Each runs in a process of its own, so that an illegal memory access or a timeout of one
leaves the others alone. Exit status 0: all passed; 1: not; 2: there is no CUDA device.
"""

import argparse
import inspect
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a bare GPU machine has the repository but no installed package

from tools.gpu import correctness, report, runs, speed  # noqa: E402
from tools.gpu.machine import Machine  # noqa: E402
from tools.gpu.report import CheckResult, StageReport, StageResult  # noqa: E402

NO_DEVICE = 2
_TERMINATION_S = 10.0


class Stage(NamedTuple):
    """A named part of the check; the docstring of ``run`` says what it proves."""

    name: str
    run: Callable[[Machine, StageReport], None]
    timeout_s: float


# Most doubtful first: a short lease of a GPU should end with what could not be known without it.
STAGES = (
    Stage("env", runs.env, 60),
    Stage("products", correctness.products, 60),
    Stage("dense", correctness.dense, 150),
    Stage("certify", correctness.certify, 180),
    Stage("train", runs.training, 320),
    Stage("linear", speed.linear, 180),
    Stage("kernels", speed.kernels, 120),
    Stage("gemm", speed.gemm, 60),
    Stage("tests", runs.gpu_tests, 240),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; the exit status."""
    options = _parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    result = CheckResult(options.smoke)
    for stage in STAGES:
        # "env" is the first to touch CUDA: this process must not, or its forked children could not
        if stage.name != "env" and stage.name not in options.stages:
            continue
        outcome = _run_in_child(stage, Machine(options.smoke), options.out)
        result.stages.append(outcome)
        result.write(options.out)
        sys.stdout.write(f"{stage.name:9} {outcome.state:9} {outcome.seconds:6.1f} s  {outcome.verdict}\n")
        sys.stdout.flush()
        if "no CUDA device" in outcome.error:
            return NO_DEVICE
    sys.stdout.write(f"written to {options.out}/gpu_check.md and gpu_check.json\n")
    return 0 if result.has_passed else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description="Check the package on one GPU; docs/gpu.md describes the stages."
    )
    parser.add_argument(
        "--stages", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu_check"), help="folder of the results; default: %(default)s"
    )
    parser.add_argument("--smoke", action="store_true", help="small sizes on the CPU; measures nothing")
    return parser.parse_args(argv)


def _run_in_child(stage: Stage, machine: Machine, out: Path) -> StageResult:
    """The stage's result, whatever becomes of its process."""
    rows_file, log_file = out / f"{stage.name}.jsonl", out / f"{stage.name}.log"
    start = time.monotonic()
    # forked, not spawned: torch is already imported, which takes seconds
    child = multiprocessing.get_context("fork").Process(
        target=_child, args=(stage, machine, rows_file, log_file), name=stage.name
    )
    child.start()
    child.join(stage.timeout_s)
    has_timed_out = child.is_alive()
    if has_timed_out:
        _end(child)
    seconds, rows = time.monotonic() - start, report.read_rows(rows_file)
    log_tail = log_file.read_text(errors="replace")[-3000:]
    state, error = report.PASSED, ""
    if has_timed_out:
        state, error = report.TIMED_OUT, f"{log_tail}\nstopped after {stage.timeout_s:g} s"
    elif child.exitcode == 1:
        state, error = report.ERROR, log_tail
    elif child.exitcode:
        state, error = report.CRASHED, f"{log_tail}\nexit code {child.exitcode}"
    elif any(row.passed is False for row in rows):
        state = report.FAILED
    return StageResult(stage.name, inspect.getdoc(stage.run) or "", state, seconds, rows, error)


def _child(stage: Stage, machine: Machine, rows_file: Path, log_file: Path) -> None:
    os.setsid()  # so that a timeout ends the processes that the stage has started, too
    # both the interpreter's streams and the descriptors that its subprocesses inherit
    sys.stdout = sys.stderr = log = log_file.open("w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        stage.run(machine, StageReport(rows_file))
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _end(child: ForkProcess) -> None:
    """SIGTERM for torchrun, which then ends its ranks; SIGKILL for what is left."""
    assert child.pid is not None
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, signum)
        except ProcessLookupError:
            break
        child.join(_TERMINATION_S)


if __name__ == "__main__":
    sys.exit(main())
