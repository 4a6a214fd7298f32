"""Stages that look at the machine, start the training command, and run the GPU tests."""

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tests.support.launching import read_metrics, read_status, train
from tests.support.run_config import write_run_config
from tools.gpu.machine import Machine
from tools.gpu.report import StageReport

ROOT = Path(__file__).parents[2]
_PACKAGES = ("torch", "triton", "megatron-core", "transformers", "pydantic")
_OPTIONAL_PACKAGES = ("transformer-engine", "sglang", "liger-kernel")


def env(machine: Machine, report: StageReport) -> None:
    """Versions, device, kernel libraries, a C compiler for Triton, and the bandwidth of a copy."""
    from megatron_gkd.platform.device import detect_platform, prepare_process
    from megatron_gkd.platform.kernels import detect_kernels

    report.measured("device", str(machine.device))
    platform = detect_platform() if machine.is_smoke else prepare_process()
    report.measured("platform", f"{platform.device}, {platform.collective_backend}: {platform.reason}")
    report.measured("kernel libraries", detect_kernels(on_cpu=platform.is_cpu).reason)
    report.measured("python", sys.version.split()[0])
    for name in _PACKAGES:
        found = _version(name)
        # Triton is a package of its own only beside CUDA builds of torch
        is_needed = not (machine.is_smoke and name == "triton")
        report.holds(name, found is not None or not is_needed, found or "not installed")
    for name in _OPTIONAL_PACKAGES:
        report.measured(name, _version(name) or "not installed")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    report.holds("C compiler", compiler is not None, compiler or "none; Triton cannot build its launcher")
    source = torch.empty(2**16 if machine.is_smoke else 2**28, device=machine.device)
    target = torch.empty_like(source)
    ms = machine.median_ms(lambda: target.copy_(source), repeats=5, warmup=2)
    report.measured("bandwidth of a copy", 2 * source.nbytes / ms / 1e9, "TB/s")


def training(machine: Machine, report: StageReport) -> None:
    """The training command on one rank: bf16, distributed optimizer, checkpoint, resume.

    The embedded engine generates, so no SGLang is needed.
    """
    first, last = (1, 2) if machine.is_smoke else (3, 5)
    with tempfile.TemporaryDirectory() as folder:
        config = write_run_config(
            Path(folder),
            student={"parallel": {"tensor_model_parallel_size": 1}},
            teacher={"parallel": {"pipeline_model_parallel_size": 1}},
            train={"precision": "bf16", "train_iters": first},
            optim={"use_distributed_optimizer": True, "overlap_grad_reduce": True},
        )
        run = Path(folder, "run")
        for label, num_iterations in (("start", first), ("resume", last)):
            output = train(config, f"train.train_iters={num_iterations}", num_ranks=1, timeout_s=150)
            status = read_status(run)
            is_done = (status["state"], status["iteration"]) == ("done", num_iterations)
            report.holds(label, is_done, f"{status['state']} at iteration {status['iteration']}")
        report.holds("resumed from the checkpoint", "Resuming from" in output, f"{first} to {last}")
        metrics = read_metrics(run)
    losses = [line["loss"] for line in metrics]
    is_complete = [line["iteration"] for line in metrics] == list(range(1, last + 1))
    report.holds(
        "losses", is_complete and all(map(math.isfinite, losses)), " ".join(f"{x:.4f}" for x in losses)
    )
    report.measured("last iteration", metrics[-1]["time/iteration_s"], "s")


def gpu_tests(machine: Machine, report: StageReport) -> None:
    """``tests/gpu``; in a smoke run they are collected and skipped."""
    workers = [] if importlib.util.find_spec("xdist") is None or machine.is_smoke else ["-n", "6"]
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", *workers]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = result.stdout.strip().splitlines() or [result.stderr[-300:]]
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            report.holds(line.split(" - ")[0], False, line)
    report.holds("pytest tests/gpu", result.returncode == 0, lines[-1])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
