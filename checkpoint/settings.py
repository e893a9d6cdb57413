"""The base of every section of a recipe: a frozen value whose fields are described."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings.

    The docstring below a field is its description: the recipe reference and the `--help` of the
    commands are generated from it. An unknown key is an error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
