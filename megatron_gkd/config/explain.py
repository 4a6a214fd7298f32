"""Rewrites pydantic's validation errors as messages with dotted key, problem, value and hint."""

import difflib
from collections.abc import Mapping
from typing import Any

from megatron_gkd.config.base import Config, all_keys, did_you_mean, sections_of


def explain(problem: Mapping[str, Any], schema: type[Config]) -> str:
    """The message of one entry of ``ValidationError.errors()``."""
    key, section, kinds = _locate(problem["loc"], schema)
    name = key.rpartition(".")[2]
    given = problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"{key}: {_explain_unknown_key(key, section, schema)}"
    if problem["type"] == "missing" or (given is None and _is_required(section, name)):
        return f"{key}: is required; {_sentence(section, name)}"
    if problem["type"].startswith("union_tag"):
        if isinstance(given, dict):
            return f"{key}.kind: must be one of {', '.join(kinds)} (got {given.get('kind')!r})"
        return f"{key}: must be a section with keys (got {given!r})"
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"{key}: must be a section with keys (got {given!r})"
    text = problem["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("valid tuple", "list")
    if problem["type"] == "literal_error":
        text += did_you_mean(
            given, problem["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        )
    got = "" if isinstance(given, dict | Config) else f" (got {given!r})"
    return f"{key}: {text}{got}"


def _locate(loc: tuple[str | int, ...], schema: type[Config]) -> tuple[str, type[Config] | None, list[str]]:
    """Dotted key of a pydantic location, the section around it, and the kinds of the key.

    Pydantic reports the kind of a section as a part of the location, which is skipped.
    """
    key, section, found = "", None, {"": schema}
    for part in loc:
        if part in found and part != "":
            found = {"": found[str(part)]}
            continue
        section = found.get("")
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
        field = section.model_fields.get(str(part)) if section else None
        found = sections_of(field) if field else {}
    return key.lstrip(".") or "(top level)", section, list(found)


def _explain_unknown_key(key: str, section: type[Config] | None, schema: type[Config]) -> str:
    """Suggest a similar key, first of the same section, then of all others."""
    name = key.rpartition(".")[2]
    known = list(section.model_fields) if section else []
    everywhere = list(all_keys(schema))
    if section and key in everywhere:  # a key of the same section's other kind
        return f"unknown key for kind {section.model_fields['kind'].default}; remove it or change the kind"
    near = did_you_mean(name, known)
    if near:
        return "unknown key" + near
    last_parts = {other.rpartition(".")[2] for other in everywhere}
    matches = difflib.get_close_matches(name, last_parts, n=1, cutoff=0.8)
    elsewhere = [other for other in everywhere if other.rpartition(".")[2] in matches]
    if elsewhere:
        return f"unknown key; did you mean {' or '.join(map(repr, elsewhere))}?"
    return f"unknown key; known here: {', '.join(known)}"


def _is_required(section: type[Config] | None, name: str) -> bool:
    return section is not None and name in section.model_fields and section.model_fields[name].is_required()


def _sentence(section: type[Config] | None, name: str) -> str:
    """The docstring of a key, or that of its section classes."""
    if section is None or name not in section.model_fields:
        return "see docs/configuration.md"
    field = section.model_fields[name]
    if field.description:
        return field.description
    return ", ".join((inner.__doc__ or "").partition("\n")[0] for inner in sections_of(field).values())
