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
    def _check_plain_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic takes and a library does not.

        `true` would count as 1. Integers beyond 64 bits overflow, and text that UTF-8 cannot encode
        or that contains NUL fails where it is first written or used as a path.
        """
        annotation = cls.model_fields[str(info.field_name)].annotation
        if _mentions(annotation, Section):
            return value  # the section checks its own fields
        takes_booleans = _mentions(annotation, bool)
        for item in _items(value):
            if isinstance(item, bool):
                if not takes_booleans:
                    message = "should not be true or false"
                    raise PydanticCustomError("unexpected_boolean", message)
            elif isinstance(item, int) and abs(item) > _LARGEST:
                message = "should be an integer of at most 64 bits"
                raise PydanticCustomError("integer_too_large", message)
            elif isinstance(item, str) and not _is_plain_text(item):
                message = "should be text without NUL, in UTF-8"
                raise PydanticCustomError("unusable_text", message)
        return value


def _is_plain_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        return False
    return "\0" not in text


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
