"""A resumed run against the configuration that its checkpoint was written with: what differs, and may it?

Every key that changes what is computed has to be allowed by name (``checkpoint.allow_changes``), unless its marker in the section
(``Free``, ``Fixed``) says otherwise. Needs no torch: a run is refused before anything starts.
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
"""File of a checkpoint that holds the configuration, under the key ``config``."""


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


def rule_of(key: str) -> OnResume:
    """The rule of a dotted key: its own marker, else that of the innermost marked section around it.

    A key that several kinds of a section have follows the strictest of them; a key that the schema no longer has
    follows its section.
    """
    rule = OnResume.BY_NAME
    sections: list[type[Config]] = [GkdConfig]
    for part in key.split("."):
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        rule = max((_marker(field, default=rule) for field in fields), default=rule)
        sections = [section for field in fields for section in sections_of(field).values()]
    return rule


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
    if fixed := [change for change in changes if rule_of(change.key) is OnResume.FIXED]:
        raise ConfigError(
            f"{folder} cannot be continued with {_join(fixed)}: the optimizer's state would be another. Set it back, or "
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
