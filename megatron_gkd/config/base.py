"""Base class of all sections, markers of their keys, and the error of an invalid configuration."""

import difflib
from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

T = TypeVar("T")


class OnResume(IntEnum):
    """Whether a key may change between a checkpoint and the run that resumes it."""

    FREE = 0
    """Always: the key sets where, how fast or how long the run computes, or what it records."""
    BY_NAME = 1
    """Only if checkpoint.allow_changes names it. Default, so that no result changes by accident."""
    FIXED = 2
    """Never: the key sets the contents or the format of the optimizer state."""


Free = Annotated[T, OnResume.FREE]
Fixed = Annotated[T, OnResume.FIXED]


class ConfigError(ValueError):
    """Invalid configuration; the message names every wrong key, its value and the fix."""

    @classmethod
    def listing(cls, source: str, problems: Iterable[str]) -> Self:
        """One error that lists all ``problems`` of ``source``, one per line."""
        lines = [f"  {problem}" for problem in problems]
        return cls(f"{len(lines)} problem{'s' if len(lines) > 1 else ''} in {source}:\n" + "\n".join(lines))


class Config(BaseModel):
    """Base of every section: frozen after loading; unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_surprising_conversions(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads `seed: true` as 1 and an empty path as the current folder
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("true and false are not accepted here")
        if value == "" and annotation in (Path, Path | None):
            raise ValueError("the path is empty; write null to leave it out")
        return value


def sections_of(field: FieldInfo) -> dict[str, type[Config]]:
    """The section classes of ``field`` by kind.

    A section without alternatives has the kind ""; the dictionary is empty for a plain value.
    """
    sections = [section for section in _types_of(field.annotation) if issubclass(section, Config)]
    if len(sections) == 1:
        return {"": sections[0]}
    return {section.model_fields["kind"].default: section for section in sections}


def kind_discriminator(default: str) -> Discriminator:
    """Discriminator of a union of sections by ``kind``, which may be left out for ``default``.

    Pydantic's own ``Field(discriminator="kind")`` requires the key.
    """

    def kind_of(value: Any) -> str | None:
        kind = value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", None)
        return kind if isinstance(kind, str) else None

    return Discriminator(kind_of)


def all_keys(schema: type[Config], prefix: str = "") -> Iterator[str]:
    """Dotted names of all sections and keys; a key of several kinds once."""
    seen: set[str] = set()
    for name, field in schema.model_fields.items():
        yield prefix + name
        for section in sections_of(field).values():
            inner = [key for key in all_keys(section, f"{prefix}{name}.") if key not in seen]
            seen.update(inner)
            yield from inner


def did_you_mean(given: Any, known: list[str]) -> str:
    """A suggestion to append to a message, or an empty text if no known name is similar."""
    near = difflib.get_close_matches(str(given), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _require_text(patterns: tuple[str, ...]) -> tuple[str, ...]:
    if any(not pattern.strip() for pattern in patterns):
        raise ValueError("an empty pattern matches nothing; remove it")
    return patterns


Patterns = Annotated[tuple[str, ...], AfterValidator(_require_text)]
"""Glob patterns of weight names, none of them empty."""


def _types_of(annotation: Any) -> Iterator[type]:
    """Classes in an annotation, inside unions and ``Annotated``."""
    if get_origin(annotation) is Annotated:
        yield from _types_of(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _types_of(member)
    elif isinstance(annotation, type):
        yield annotation
