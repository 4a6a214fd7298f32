"""Loads YAML files and ``section.key=value`` overrides into one validated, frozen tree."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_gkd.config.base import Config, ConfigError, sections_of
from megatron_gkd.config.check import check_config
from megatron_gkd.config.explain import explain
from megatron_gkd.config.schema import GkdConfig
from megatron_gkd.config.yaml_text import load_yaml_file, parse_yaml

log = logging.getLogger(__name__)


def load_config(paths: Path | Sequence[Path], overrides: Sequence[str] = ()) -> GkdConfig:
    """Merge ``paths`` left to right, then ``overrides`` left to right, and validate the result.

    Later values replace earlier ones; sections are merged key by key, lists replaced as a whole. Relative paths are
    relative to the working directory. If a later file or override changes the kind of a section, earlier keys that the
    new kind does not have are dropped with a log message.

    Args:
        paths: One YAML file or several.
        overrides: Strings ``section.key=value``; the value is parsed as YAML.

    Raises:
        ConfigError: All problems of a stage, each with key, value and fix. The stages are: reading the files; types,
            ranges and unknown keys; ``check_config``.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    tree: dict[str, Any] = {}
    for file in files:
        _merge_layer(tree, load_yaml_file(Path(file)), str(file))
    for override in overrides:
        _merge_layer(tree, _parse_override(override), f"override {override!r}")
    config = _validate(tree, ", ".join([*map(str, files), *(["overrides"] if overrides else [])]))
    check_config(config)
    return config


def _validate(tree: dict[str, Any], source: str) -> GkdConfig:
    _drop_empty_sections(tree, GkdConfig)
    try:
        return GkdConfig.model_validate(tree)
    except ValidationError as error:
        problems = [explain(problem, GkdConfig) for problem in error.errors(include_url=False)]
        raise ConfigError.listing(source, problems) from None


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    value = parse_yaml(text, source=f"override {override!r}")
    for part in reversed(parts):
        value = {part: value}
    return value


def _merge_layer(tree: dict[str, Any], layer: dict[str, Any], source: str) -> None:
    for name, section in layer.items():
        if isinstance(section, dict) and isinstance(tree.get(name), dict):
            _drop_keys_of_other_kind(name, tree[name], section, source)
    _merge(tree, layer, source)


def _merge(tree: dict[str, Any], layer: dict[str, Any], source: str, prefix: str = "") -> None:
    for name, value in layer.items():
        key, old = prefix + name, tree.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            _merge(old, value, source, f"{key}.")
        elif isinstance(old, dict) and value is not None:
            raise ConfigError(
                f"{source}: {key}={value!r} would replace a whole section; "
                f"set its keys, such as {key}.{next(iter(old), 'key')}"
            )
        elif isinstance(value, dict) and old is not None:
            raise ConfigError(
                f"{source}: {key}.{next(iter(value), '')} cannot be set, "
                f"because {key} is a value ({old!r}), not a section"
            )
        elif not (
            isinstance(old, dict) and value is None
        ):  # null in place of a section keeps it: its keys may all be commented out
            tree[name] = value


def _drop_keys_of_other_kind(name: str, old: dict[str, Any], new: dict[str, Any], source: str) -> None:
    field = GkdConfig.model_fields.get(name)
    section = sections_of(field).get(str(new.get("kind"))) if field else None
    if section is None or new["kind"] == old.get("kind"):
        return
    dropped = [key for key in old if key not in section.model_fields]
    for key in dropped:
        del old[key]
    if dropped:
        log.info(
            "%s sets %s.kind=%s, which has no %s: left out", source, name, new["kind"], ", ".join(dropped)
        )


def _drop_empty_sections(tree: dict[str, Any], schema: type[Config]) -> None:
    """Replace null sections, whose keys are all commented out, by empty ones."""
    for name, field in schema.model_fields.items():
        sections = list(sections_of(field).values())
        if sections and name in tree and tree[name] is None:
            tree[name] = {}
        if isinstance(tree.get(name), dict):
            for section in sections[:1]:
                _drop_empty_sections(tree[name], section)
