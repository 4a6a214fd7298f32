"""No key without effect: each one is read as an attribute somewhere outside the configuration package, or by a property or
public method of a section.

Names are compared, not values: a key whose name another section uses too counts as read when either is. A key with a single
choice says what happens; there is nothing to read.
"""

import ast
from collections.abc import Iterator
from typing import Literal, get_args, get_origin

from megatron_gkd.config import GkdConfig
from megatron_gkd.config.base import Config, sections_of
from tests.support.processes import ROOT

PACKAGE = ROOT / "megatron_gkd"


def leaf_keys(section: type[Config], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, dotted key) of every key that is not a section and has a choice."""
    for name, field in section.model_fields.items():
        inner = sections_of(field)
        if not inner and not is_single_choice(field.annotation):
            yield name, prefix + name
        for kind in inner.values():
            yield from leaf_keys(kind, f"{prefix}{name}.")


def is_single_choice(annotation: object) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def attributes_read(tree: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def names_read() -> set[str]:
    names = set()
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        if file.parent != PACKAGE / "config":
            names |= attributes_read(tree)
            continue
        for section in filter(lambda node: isinstance(node, ast.ClassDef), ast.walk(tree)):
            for node in section.body:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):  # those check values
                    names |= attributes_read(node)
    return names


def test_every_key_is_read():
    read = names_read()
    unread = sorted({dotted for name, dotted in leaf_keys(GkdConfig) if name not in read})
    assert not unread, f"keys that nothing reads: {', '.join(unread)}"
