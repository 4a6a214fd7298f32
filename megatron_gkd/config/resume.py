"""Comparison of a resumed run's configuration with that of its checkpoint.

Markers at the keys (``Free``, ``Fixed``) decide what may change; ``checkpoint.allow_changes`` permits further keys by name.
Imports no torch, so that a run is refused before any process group or engine starts.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from megatron_gkd.config.base import Config, ConfigError, OnResume, sections_of
from megatron_gkd.config.schema import GkdConfig

STATE_FILE = "state.json"
"""File of a checkpoint with the configuration under the key ``config``."""


class Change(NamedTuple):
    """A key with its old and new value; ``None`` where a side does not have the key."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} (was {self.old!r}, is {self.new!r})"


def is_named(key: str, names: Iterable[str]) -> bool:
    """Whether ``names`` holds ``key`` or a section around it."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def rule_of(key: str) -> OnResume:
    """The rule of a dotted key: its own marker, else that of the innermost marked section.

    Where several kinds of a section have the key, the strictest marker wins. A key that a later schema removed has the
    rule of its section.
    """
    rule = OnResume.BY_NAME
    sections: list[type[Config]] = [GkdConfig]
    for part in key.split("."):
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        rule = max((_marker(field, default=rule) for field in fields), default=rule)
        sections = [section for field in fields for section in sections_of(field).values()]
    return rule


def finished_checkpoints(folder: Path) -> list[Path]:
    """Folders ``iter_<n>``, oldest first; their contents are not verified, other names are ignored."""
    return sorted(p for p in folder.glob("iter_*") if p.name.removeprefix("iter_").isdecimal())


def check_resume(config: GkdConfig) -> None:
    """Check the changes since the newest checkpoint of the run's folder.

    Raises:
        ConfigError: Names every key that may not change, both values and the fix.
    """
    if not config.checkpoint.resume:
        return
    for folder in reversed(finished_checkpoints(config.checkpoint_dir)):
        if (folder / STATE_FILE).is_file():
            permitted_changes(folder, config)
            return


def permitted_changes(folder: Path, config: GkdConfig) -> list[Change]:
    """Changes since the checkpoint in ``folder``, all of them permitted.

    Raises:
        ConfigError: A key changed that may not.
    """
    stored = json.loads((folder / STATE_FILE).read_text())["config"]
    changes = list(_changes(stored, config.model_dump(mode="json")))
    if fixed := [change for change in changes if rule_of(change.key) is OnResume.FIXED]:
        raise ConfigError(
            f"{folder} cannot be continued with {_join(fixed)}: the optimizer state would not fit. Set it back, or "
            f"start a new run from these weights: student.hf=null student.checkpoint={folder} and another train.output_dir"
        )
    allowed = config.checkpoint.allow_changes
    by_name = [change for change in changes if rule_of(change.key) is OnResume.BY_NAME]
    if refused := [change for change in by_name if not is_named(change.key, allowed)]:
        names = [*allowed, *(change.key for change in refused)]
        raise ConfigError(
            f"{folder} was written with another configuration; set back {_join(refused)}, "
            f"or allow it with checkpoint.allow_changes=[{','.join(names)}]"
        )
    return changes


def _marker(field: FieldInfo, *, default: OnResume) -> OnResume:
    return next((mark for mark in field.metadata if isinstance(mark, OnResume)), default)


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
