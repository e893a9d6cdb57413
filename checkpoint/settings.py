"""The base of every section of a recipe: a frozen value whose fields are described."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

_LARGEST = 2**63 - 1
"""Largest integer that libraries take."""


class Section(BaseModel):
    """A group of settings.

    The docstring below a field is its description: the recipe reference and the `--help` of the
    commands are generated from it. An unknown key is an error.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _check_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse two values that pydantic takes without a message: `true` for 1, and integers that
        no library takes.
        """
        annotation = cls.model_fields[str(info.field_name)].annotation
        is_plain = not _mentions(annotation, Section)
        for item in _items(value) if is_plain else [value]:
            if isinstance(item, bool):
                if is_plain and not _mentions(annotation, bool):
                    message = "input should not be true or false"
                    raise PydanticCustomError("unexpected_boolean", message)
            elif isinstance(item, int) and abs(item) > _LARGEST:
                message = "input should be an integer of at most 64 bits"
                raise PydanticCustomError("integer_too_large", message)
        return value


def _mentions(annotation: Any, wanted: type) -> bool:
    """Whether a type, or a subclass of it, occurs in an annotation such as `tuple[int, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, wanted):
        return True
    return any(_mentions(part, wanted) for part in get_args(annotation))


def _items(value: Any) -> list[Any]:
    """A value itself, or what a list or mapping consists of."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    return [value]
