"""Base class and helpers of all sections, and the error that a wrong configuration raises."""

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
    """Whether the value of a key may differ from that in the checkpoint which a run resumes."""

    FREE = 0
    """It may: the key decides where, how fast or how long something is computed, or what is recorded."""
    BY_NAME = 1
    """Only if checkpoint.allow_changes names it. The rule of keys without a marker: nothing changes by accident."""
    FIXED = 2
    """It may not: the key decides what the optimizer's state is or how it is stored."""


Free = Annotated[T, OnResume.FREE]
Fixed = Annotated[T, OnResume.FIXED]


class ConfigError(ValueError):
    """The configuration cannot be used; the message names every wrong key, its value and what to change."""

    @classmethod
    def listing(cls, source: str, problems: Iterable[str]) -> Self:
        """One error for all ``problems`` found in ``source``, one per line."""
        lines = [f"  {problem}" for problem in problems]
        return cls(f"{len(lines)} problem{'s' if len(lines) > 1 else ''} in {source}:\n" + "\n".join(lines))


class Config(BaseModel):
    """Base of every section: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_surprising_conversions(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would read ``seed: true`` as 1 and an empty path as the current folder."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("true and false are not accepted here")
        if value == "" and annotation in (Path, Path | None):
            raise ValueError("the path is empty; write null to leave it out")
        return value


def sections_of(field: FieldInfo) -> dict[str, type[Config]]:
    """Sections that ``field`` can hold, by kind; one without alternatives has the kind "", a value has none."""
    sections = [section for section in _types_of(field.annotation) if issubclass(section, Config)]
    if len(sections) == 1:
        return {"": sections[0]}
    return {section.model_fields["kind"].default: section for section in sections}


def kind_discriminator(default: str) -> Discriminator:
    """Chooses the alternative of a section by its key ``kind``; ``default`` if it has none."""

    def kind_of(value: Any) -> str | None:
        kind = value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", None)
        return kind if isinstance(kind, str) else None

    return Discriminator(kind_of)


def all_keys(schema: type[Config], prefix: str = "") -> Iterator[str]:
    """Dotted names of all sections and keys."""
    seen: set[str] = set()
    for name, field in schema.model_fields.items():
        yield prefix + name
        for section in sections_of(field).values():
            inner = [key for key in all_keys(section, f"{prefix}{name}.") if key not in seen]
            seen.update(inner)
            yield from inner


def did_you_mean(given: Any, known: list[str]) -> str:
    """The nearest of the known names as the end of a sentence; empty if none is near."""
    near = difflib.get_close_matches(str(given), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _require_text(patterns: tuple[str, ...]) -> tuple[str, ...]:
    if any(not pattern.strip() for pattern in patterns):
        raise ValueError("an empty pattern matches nothing; remove it")
    return patterns


Patterns = Annotated[tuple[str, ...], AfterValidator(_require_text)]
"""Glob patterns of weight names."""


def _types_of(annotation: Any) -> Iterator[type]:
    """The classes in an annotation, through unions and ``Annotated``."""
    if get_origin(annotation) is Annotated:
        yield from _types_of(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _types_of(member)
    elif isinstance(annotation, type):
        yield annotation
