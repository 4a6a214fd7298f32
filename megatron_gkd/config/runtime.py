"""The logging and runtime sections: records of a run, environment and logs of its processes."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_gkd.config.base import Config

TORCHRUN_VARIABLES = frozenset(
    {
        "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME",
        "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE",
        "MASTER_ADDR", "MASTER_PORT",
    }
)  # fmt: skip
TORCHRUN_PREFIXES = ("TORCHELASTIC_", "PET_")
PLACEHOLDERS = ("output_dir", "host", "process")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_READ_AT_PROCESS_START = ("LD_", "PYTHON", "MALLOC_")


class LoggingConfig(Config):
    """Messages, metrics and samples that the run records."""

    level: Literal["debug", "info", "warning"] = "info"
    """Lowest level of the messages that are logged."""
    tensorboard: bool = True
    """Write the metrics to TensorBoard in addition to metrics.jsonl."""
    num_samples: int = Field(default=2, ge=0)
    """Samples per iteration written to samples.jsonl."""


class RuntimeConfig(Config):
    """Environment and logs of ranks and SGLang servers; pass configs/runtime_env.yaml as another --config."""

    env_vars: dict[str, str | None] = Field(default={})
    """Environment variables, set before torch, NCCL, Transformer Engine or SGLang reads them. They are logged and written
    to config.yaml, so they must not hold secrets. A value from the shell or the job script wins, with a log message.
    {output_dir}, {host} and {process} (rank_0, sglang, ...) are replaced in values; null removes a variable of an earlier
    file. Servers get them too, except thread counts and CUDA_DEVICE_MAX_CONNECTIONS (see rollout.num_threads)."""
    log_file: str = "{output_dir}/logs/{process}.log"
    """Log file of each rank; placeholders as in env_vars, {process} is required."""
    working_dir: Path = Path()
    """Folder of the code. Only launch/submit.py reads it: it copies the folder to train.output_dir/code, and the job runs
    the copy."""
    excludes: tuple[str, ...] = (".git/", ".venv/", "__pycache__/", "*.egg-info/", ".*_cache/", "/runs/")
    """Patterns that launch/submit.py does not copy, as in .gitignore: a name at any depth, or a path below working_dir if
    it starts with /; a pattern that ends with / matches folders only."""

    @field_validator("env_vars", mode="before")
    @classmethod
    def _numbers_are_texts(cls, value: Any) -> Any:
        """Convert numbers to texts: YAML reads ``OMP_NUM_THREADS: 1`` as a number."""
        if not isinstance(value, dict):
            return value
        return {name: str(text) if type(text) in (int, float) else text for name, text in value.items()}

    @field_validator("env_vars")
    @classmethod
    def _variables_can_be_set(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        for name, text in value.items():
            _check_name(name)
            _check_placeholders(name, text or "")
        return value

    @field_validator("log_file")
    @classmethod
    def _ranks_write_different_files(cls, value: str) -> str:
        _check_placeholders("log_file", value)
        if "{process}" not in value:
            raise ValueError("needs {process}; otherwise all ranks would write one file")
        return value

    @field_validator("excludes")
    @classmethod
    def _patterns_match_something(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            if not pattern.strip("/"):
                raise ValueError(f"the pattern {pattern!r} matches nothing; remove it")
            if "/" in pattern.strip("/") and not pattern.startswith("/"):
                raise ValueError(f"{pattern!r} is a path; begin it with / to anchor it at working_dir")
        return value


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of an environment variable")
    if name in TORCHRUN_VARIABLES or name.startswith(TORCHRUN_PREFIXES):
        raise ValueError(f"{name} belongs to torchrun; use its options")
    if name.startswith(_READ_AT_PROCESS_START):
        raise ValueError(
            f"{name} is read when a process starts, before this file; set it in the shell or job script"
        )


def _check_placeholders(name: str, text: str) -> None:
    unknown = [found for found in _PLACEHOLDER.findall(text) if found not in PLACEHOLDERS]
    if unknown:
        known = ", ".join(f"{{{placeholder}}}" for placeholder in PLACEHOLDERS)
        raise ValueError(f"{name} has the unknown placeholder {{{unknown[0]}}}; known: {known}")
