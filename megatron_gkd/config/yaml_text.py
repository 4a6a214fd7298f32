"""Parses YAML into plain values; repeated keys are errors, and errors name file and line."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from megatron_gkd.config.base import ConfigError


def load_yaml_file(file: Path) -> dict[str, Any]:
    """The mapping in ``file``; an empty file is an empty mapping.

    Raises:
        ConfigError: The file is missing, is not YAML, repeats a key or holds something other than a mapping.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"configuration file {file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {file} cannot be read: {error}") from None
    value = parse_yaml(text, source=str(file))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds {type(value).__name__}; a mapping of sections is needed")
    return value


def parse_yaml(text: str, *, source: str) -> Any:
    """The value of ``text``; ``source`` names it in errors.

    Raises:
        ConfigError: Not YAML, or a mapping repeats a key; names the line.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        raise ConfigError(f"{where}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {error}") from None


class _StrictLoader(yaml.SafeLoader):
    """Refuses repeated keys, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not a text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given a second time", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
