"""A resumed run against the configuration that its checkpoint was written with: what differs, and may it?

Every key that changes what is computed has to be allowed by name (``checkpoint.allow_changes``), so that nothing changes
by accident; so does every key that this file does not know. Needs no torch: a run is refused before anything starts.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_gkd.config.base import ConfigError
from megatron_gkd.config.schema import GkdConfig

STATE_FILE = "state.json"
"""File of a checkpoint that holds the configuration, under the key ``config``."""

FREE = (
    "student.parallel",
    "student.make_vocab_size_divisible_by",
    "teacher.parallel",
    "student.recompute",
    "teacher.micro_batch_size",
    "teacher.server_ip",
    "teacher.server_port",
    "teacher.api_key_env",
    "teacher.requests_in_flight",
    "teacher.request_timeout_s",
    "teacher.max_retries",
    "rollout.placement",
    "rollout.urls",
    "rollout.api_key_env",
    "rollout.tensor_model_parallel_size",
    "rollout.start_timeout_s",
    "rollout.request_timeout_s",
    "rollout.max_retries",
    "rollout.push_dir",
    "rollout.probe_tolerance",
    "rollout.mem_fraction_static",
    "rollout.num_threads",
    "rollout.on_engine_failure",
    "loss.tokens_per_chunk",
    "loss.backend",
    "loss.rows_per_pass",
    "optim.overlap_grad_reduce",
    "data.max_bad_rows",
    "train.train_iters",
    "train.epochs",
    "train.micro_batch_size",
    "train.output_dir",
    "train.max_skipped_updates",
    "evaluation",
    "checkpoint",
    "runtime",
    "logging",
)
"""Sections and keys that say where and how fast something is computed, how long, or what is recorded."""

FIXED = (
    "optim.optimizer",
    "optim.use_distributed_optimizer",
    "student.freeze",
    "student.lora",
    "train.precision",
)
"""Keys that decide what the optimizer's state is and how it is stored."""


class Change(NamedTuple):
    """A key whose value differs; a key that one of the sides lacks has ``None`` there."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} (was {self.old!r}, is {self.new!r})"


def is_named(key: str, names: Iterable[str]) -> bool:
    """Whether ``key`` is one of ``names`` or lies in a section of that name."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def finished_checkpoints(folder: Path) -> list[Path]:
    """Folders ``iter_<n>``, the oldest first; what is in them is not looked at, what has another name is not ours."""
    return sorted(p for p in folder.glob("iter_*") if p.name.removeprefix("iter_").isdecimal())


def check_resume(config: GkdConfig) -> None:
    """Refuse a run that would continue the newest checkpoint of its folder with changes that are not allowed.

    Raises:
        ConfigError: Names every such key with both values and what to do.
    """
    if not config.checkpoint.resume:
        return
    for folder in reversed(finished_checkpoints(config.checkpoint_dir)):
        if (folder / STATE_FILE).is_file():
            permitted_changes(folder, config)
            return


def permitted_changes(folder: Path, config: GkdConfig) -> list[Change]:
    """What differs from the configuration that the checkpoint in ``folder`` was written with, all of it allowed.

    Raises:
        ConfigError: Something else differs, too.
    """
    stored = json.loads((folder / STATE_FILE).read_text())["config"]
    changes = list(_changes(stored, config.model_dump(mode="json")))
    if fixed := [change for change in changes if is_named(change.key, FIXED)]:
        raise ConfigError(
            f"{folder} cannot be continued with {_join(fixed)}: the optimizer's state would be another. Set it back, or "
            f"start a new run from these weights: student.hf=null student.checkpoint={folder} and another train.output_dir"
        )
    allowed = (*FREE, *config.checkpoint.allow_changes)
    if refused := [change for change in changes if not is_named(change.key, allowed)]:
        names = [*config.checkpoint.allow_changes, *(change.key for change in refused)]
        raise ConfigError(
            f"{folder} was written with another configuration; set back {_join(refused)}, "
            f"or allow it with checkpoint.allow_changes=[{','.join(names)}]"
        )
    return changes


def _join(changes: list[Change]) -> str:
    return ", ".join(map(str, changes))


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    before, after = dict(_leaves(old)), dict(_leaves(new))
    for key in before | after:
        first, second = before.get(key), after.get(key)
        if _normal(first) != _normal(second):
            yield Change(key, first, second)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _normal(value: Any) -> Any:
    # ./models/a/ and models/a are the same folder
    return os.path.normpath(value) if isinstance(value, str) and value else value
