"""Every field is documented, once, and the page and `--help` are generated from it."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

import recipes
from calibrate.sources.source import Source, known_sources, register_source, unregister_source
from recipes.reference import render_fields, render_reference, sections
from recipes.schema import Recipe

ROOT = Path(recipes.__file__).parents[1]
SECTIONS = dict(sections(Recipe)) | {"recipe": Recipe}


def rows() -> list[list[str]]:
    """The cells of every row of the page's tables that describes a field."""
    found = []
    for line in render_reference().splitlines():
        if line.startswith("| `"):
            found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def test_the_page_is_what_the_generator_makes():
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page == render_reference(), "run python -m recipes.reference > docs/recipe.md"


def test_the_sections_are_those_of_the_rooms():
    assert {
        "video",
        "calibrate",
        "quantize",
        "quantize.layers.N",
        "quantize.auto",
        "distill",
        "accuracy",
        "accuracy.tasks",
        "accuracy.suites",
        "serve",
    } == SECTIONS.keys() - {"recipe"}


@pytest.mark.parametrize("name", SECTIONS)
def test_every_field_of_a_section_has_a_description(name):
    section = SECTIONS[name]
    assert section.__doc__
    assert section.model_fields
    for field, info in section.model_fields.items():
        assert info.description, f"{name}.{field}"


def test_every_row_of_the_page_has_a_type_a_default_and_a_meaning():
    fields = sum(len(section.model_fields) for section in SECTIONS.values())
    fields += sum(len(source.model_fields) for source in known_sources().values())
    assert len(rows()) == fields
    for row in rows():
        assert len(row) == 4, row
        assert all(row), row


def test_bounds_and_alternatives_are_shown():
    page = render_reference()
    assert "| `pruning_rate` | number (≥ 0, < 1) | `0.75` |" in page
    assert "| `host_memory_gb` | number (> 0) or null | `null` |" in page
    assert "| `memory` | `auto` or `whole` or `layers` | `auto` |" in page
    assert "| `sources` | list of source | `[{type: synthetic}]` |" in page
    assert "| `model` | text | required |" in page


def test_no_python_appears_on_the_page():
    page = render_reference()
    for word in ("PydanticUndefined", "<class", "NoneType", "typing.", "Annotated"):
        assert word not in page


def test_help_lists_every_field_with_default_and_meaning():
    lines = render_fields().splitlines()
    names = [line.strip().partition("=")[0] for line in lines if not line.startswith(" " * 6)]
    assert "model" in names
    assert "quantize.layers.N.format" in names
    assert "accuracy.tasks.max_loss" in names
    for name, section in SECTIONS.items():
        prefix = "" if name == "recipe" else f"{name}."
        for field in section.model_fields:
            if f"{prefix}{field}" not in SECTIONS:
                assert f"{prefix}{field}" in names
    assert "  video.pruning_rate=0.75" in lines
    assert max(len(line) for line in lines) <= 100


def test_a_source_that_is_registered_appears_on_the_page():
    @register_source
    class Rows(Source):
        """Rows of a table."""

        type: Literal["rows_of_a_test"]
        most: Annotated[int, Field(ge=2)] = 7
        """Rows to read at most."""

    try:
        page = render_reference()
    finally:
        unregister_source(Rows)
    assert "### `rows_of_a_test`\n\nRows of a table.\n" in page
    assert "| `most` | integer (≥ 2) | `7` | Rows to read at most. |" in page
    assert "| `type` | `rows_of_a_test` | required | Which kind of source it is. |" in page
    assert "rows_of_a_test" not in render_reference()
