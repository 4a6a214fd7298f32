"""Start the training command as a user does, and read what it leaves behind."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.support.processes import ONE_THREAD, ROOT, run_python, wait_until
from tests.support.tiny_models import write_prompts, write_tiny_model


def write_run_config(folder: Path, **sections: Any) -> Path:
    """A student (TP2), a teacher of another depth (PP2), prompts, and a YAML file for two ranks that uses them.

    ``sections`` replace or extend the sections of the same name.
    """
    tree: dict[str, Any] = {
        "student": {
            "hf": str(write_tiny_model(folder / "student", seed=1)),
            "parallel": {"tensor_model_parallel_size": 2},
        },
        "teacher": {
            "hf": str(
                write_tiny_model(folder / "teacher", seed=2, num_layers=2, hidden_size=32, num_heads=2)
            ),
            "parallel": {"pipeline_model_parallel_size": 2},
        },
        "rollout": {"kind": "megatron", "max_new_tokens": 12},
        "gkd": {"lmbda": 0.5},
        "data": {"prompts": str(write_prompts(folder / "prompts.jsonl", 20)), "max_prompt_length": 64},
        "optim": {"lr": 3e-3, "warmup_iters": 1, "decay_style": "cosine"},
        "train": {
            "train_iters": 4,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "output_dir": str(folder / "run"),
            "precision": "fp32",
        },
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def _torchrun(config: Path, overrides: tuple[str, ...], num_ranks: int) -> list[str]:
    """The command that a user types, as arguments of Python."""
    return [
        "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks),
        str(ROOT / "launch" / "pretrain_gkd.py"), "--config", str(config), *overrides,
    ]  # fmt: skip


def run_torchrun(config: Path, *overrides: str, num_ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, whatever that is."""
    return run_python(*_torchrun(config, overrides, num_ranks))


def launch(
    config: Path, *overrides: str, num_ranks: int = 2, log_file: Path | None = None
) -> subprocess.Popen:
    """Start the command in a session of its own; its output goes to ``log_file``."""
    with (log_file or config.with_suffix(".log")).open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *_torchrun(config, overrides, num_ranks)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ONE_THREAD},
            start_new_session=True,
        )


def train(config: Path, *overrides: str, num_ranks: int = 2, timeout_s: float = 240.0) -> str:
    """Run the command to its end; returns its output.

    Raises:
        AssertionError: It failed; the message has its output.
    """
    log_file = config.with_suffix(".log")
    log_file.unlink(missing_ok=True)
    code = launch(config, *overrides, num_ranks=num_ranks, log_file=log_file).wait(timeout_s)
    output = log_file.read_text()
    assert code == 0, output[-5000:]
    return output


def wait_for_run(
    condition: Callable[[], object], process: subprocess.Popen, log_file: Path, timeout_s: float
) -> None:
    """Wait until ``condition`` holds while the launched ``process`` lives.

    Raises:
        AssertionError: It ended before, or the condition did not hold in time; the message has the end of its log.
    """

    def log_tail() -> str:
        return log_file.read_text()[-5000:]

    def is_met() -> bool:
        met = bool(condition())
        assert met or process.poll() is None, log_tail()
        return met

    wait_until(is_met, timeout_s, explain=log_tail)


def read_status(run: Path) -> dict[str, Any]:
    """``status.json``."""
    return json.loads((run / "status.json").read_text())


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; the last may be half-written while the run goes on, and is left out then."""
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
