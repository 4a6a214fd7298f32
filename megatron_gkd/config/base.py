"""What all sections of the configuration have in common."""

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Discriminator, ValidationInfo, field_validator
from pydantic.fields import FieldInfo


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


def _types_of(annotation: Any) -> Iterator[type]:
    """The classes in an annotation, through unions and ``Annotated``."""
    if get_origin(annotation) is Annotated:
        yield from _types_of(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _types_of(member)
    elif isinstance(annotation, type):
        yield annotation
