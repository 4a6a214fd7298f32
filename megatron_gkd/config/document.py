"""Generates the file of all defaults and the reference of all keys from the schema.

``make docs`` runs this module; a test compares both files with the schema.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from megatron_gkd.config.base import Config, sections_of
from megatron_gkd.config.schema import GkdConfig

DEFAULTS_FILE = Path("configs/on_policy_distill_trainer.yaml")
REFERENCE_FILE = Path("docs/configuration.md")

_DEFAULTS_HEAD = """\
# All keys with their defaults. Generated from the schema by `make docs`; do not edit.
# Use it with overrides, or copy the keys that you change into your own file:
#   torchrun --nproc-per-node 8 launch/pretrain_gkd.py \\
#     --config configs/on_policy_distill_trainer.yaml student.hf=... teacher.hf=...
# Keys marked "required" have no default.
"""

_REFERENCE_HEAD = """\
# Configuration

All keys, generated from the schema (`megatron_gkd/config/`) by `make docs`; do not edit.

`--config FILE` can be repeated; later files, then `section.key=value` overrides, replace earlier values. Unknown
keys, wrong types and values out of range are errors, all reported at once. `--check` validates without starting
anything and without torch. A run writes the complete tree to `config.yaml` in its output folder, which can be passed
as `--config` again.
"""


def render_defaults() -> str:
    """Text of ``DEFAULTS_FILE``."""
    return _DEFAULTS_HEAD + "\n".join(_render_section(GkdConfig, 0)) + "\n"


def render_reference() -> str:
    """Text of ``REFERENCE_FILE``."""
    return _REFERENCE_HEAD + "\n".join(_render_tables(GkdConfig, "")) + "\n"


def write_documents(root: Path) -> None:
    """Write both files under the repository ``root``."""
    for file, text in ((DEFAULTS_FILE, render_defaults()), (REFERENCE_FILE, render_reference())):
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text(text, encoding="utf-8")


def _render_section(section: type[Config], depth: int, kind_text: str = "") -> Iterator[str]:
    indent = "  " * depth
    fields = sorted(section.model_fields.items(), key=lambda item: item[0] != "kind")
    for name, field in fields:
        inner = sections_of(field)
        if inner:
            if depth == 0:
                yield ""
            yield from _comment(_summary(inner), indent)
            yield f"{indent}{name}:"
            yield from _render_section(next(iter(inner.values())), depth + 1, _describe_kinds(inner))
            continue
        text = kind_text if name == "kind" else _sentence(field)
        yield from _comment(f"{text} [{_describe_type(field)}]", indent)
        yield f"{indent}{name}: {_default_text(field)}".rstrip()


def _render_tables(section: type[Config], prefix: str) -> Iterator[str]:
    """The table of the section's own keys, then the tables of its sections."""
    plain = {name: field for name, field in section.model_fields.items() if not sections_of(field)}
    if plain:
        yield "| key | type | default | meaning |"
        yield "|---|---|---|---|"
        for name, field in plain.items():
            default = f"`{_default_text(field)}`" if not field.is_required() else "required"
            type_text = _describe_type(field).removesuffix(", required").replace("|", "\\|")
            yield f"| `{prefix}{name}` | {type_text} | {default} | {_sentence(field)} |"
    for name, field in section.model_fields.items():
        for kind, inner in sections_of(field).items():
            yield ""
            yield f"## {prefix}{name}" + (f" (kind: {kind})" if kind else "")
            yield ""
            yield (inner.__doc__ or "").strip()
            yield ""
            yield from _render_tables(inner, f"{prefix}{name}.")


def _summary(sections: dict[str, type[Config]]) -> str:
    if len(sections) == 1:
        return (next(iter(sections.values())).__doc__ or "").strip()
    return " ".join(f"kind {kind}: {(section.__doc__ or '').strip()}" for kind, section in sections.items())


def _describe_kinds(sections: dict[str, type[Config]]) -> str:
    """The docstrings of ``kind`` in all kinds, as in "megatron: A model on the ranks. none: No teacher."."""
    return " ".join(
        f"{kind}: {_sentence(section.model_fields['kind'])}" for kind, section in sections.items() if kind
    )


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), 108, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
    )


def _sentence(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _default_text(field: FieldInfo) -> str:
    """The default in YAML; empty for a required key."""
    if field.is_required():
        return ""
    default: Any = field.default
    if isinstance(default, tuple | Path):
        default = str(default) if isinstance(default, Path) else list(default)
    text = yaml.safe_dump(default, default_flow_style=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _describe_type(field: FieldInfo) -> str:
    """Type, limits and whether the key is required, for example "int, >= 1, required"."""
    parts = [_type_name(field.annotation)]
    for limit in field.metadata:
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if getattr(limit, attribute, None) is not None:
                parts.append(f"{sign} {getattr(limit, attribute):g}")
    if field.is_required():
        parts.append("required")
    return ", ".join(parts)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return f"list of {_type_name(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return f"section of names with {_type_name(get_args(annotation)[1])}"
    if isinstance(annotation, type):
        return {"str": "text", "Path": "path", "NoneType": "null"}.get(
            annotation.__name__, annotation.__name__
        )
    return " or ".join(_type_name(member) for member in get_args(annotation))


if __name__ == "__main__":
    write_documents(Path())
