"""What a source of samples is, and the register of the sources that recipes can name."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError
from pydantic_core import PydanticCustomError

from calibrate.samples import Sample, Skipped
from checkpoint.faults import Fault, nearest, shortened
from checkpoint.reading import regular_file_fault
from checkpoint.settings import Section

_BUILT_IN = (
    "calibrate.sources.jsonl",
    "calibrate.sources.hub",
    "calibrate.sources.llava",
    "calibrate.sources.parquet",
    "calibrate.sources.synthetic.source",
)
"""Modules that register the sources that come with the project."""


def file_or_folder_faults(path: Path) -> Iterator[Fault]:
    """Yield a fault when a path is neither a folder nor a file that can be read."""
    fault = None if path.is_dir() else regular_file_fault(path)
    if fault is not None:
        yield fault


class Source(Section):
    """A source of samples, as a recipe describes it.

    A subclass declares `type` as a `Literal` of its name and implements `read`.
    """

    example: ClassVar[str] = ""
    """What a file of it holds, for docs/recipe.md."""

    type: str
    """Which kind of source it is."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of the samples that come from this source, relative to the other sources."""

    def read(self, samples: int, seed: int, skipped: Skipped) -> Iterator[Sample]:
        """Yield samples, the same ones at every call.

        Args:
            samples: How many are wanted; a source may yield more or fewer.
            seed: For a source that draws its samples.
            skipped: Takes the samples that cannot be used.

        Raises:
            BadInput: The source cannot be read, or `skipped` is full.
        """
        raise NotImplementedError

    def count(self, samples: int) -> int:
        """Return how many of `samples` there are rows for, as far as that is known cheaply.

        The plan of a run follows it. Rows that cannot be used are counted too.
        """
        return samples

    def faults(self) -> Iterator[Fault]:
        """Yield why the source cannot be read, as far as its files tell before one is opened."""
        for file in self.files():
            fault = regular_file_fault(file)
            if fault is not None:
                yield fault

    def files(self) -> list[Path]:
        """Files whose content decides the samples; a run is not resumed when one has changed."""
        return []


_SOURCES: dict[str, type[Source]] = {}


def register_source(source: type[Source]) -> type[Source]:
    """Make a source known under the name in its `type` field. May be used as a decorator."""
    (name,) = get_args(source.model_fields["type"].annotation)
    _SOURCES[name] = source
    return source


def unregister_source(source: type[Source]) -> None:
    """Undo `register_source`."""
    (name,) = get_args(source.model_fields["type"].annotation)
    _SOURCES.pop(name, None)


def known_sources() -> dict[str, type[Source]]:
    """All registered sources by name."""
    for module in _BUILT_IN:
        importlib.import_module(module)
    return dict(_SOURCES)


def _parse_source(value: Any) -> Any:
    if isinstance(value, Source):
        return value
    if not isinstance(value, dict):
        raise ValueError("give a mapping with a type, such as {type: jsonl, path: samples.jsonl}")
    sources = known_sources()
    name = value.get("type")
    if not isinstance(name, str) or name not in sources:
        raise ValueError(
            f"unknown source type {shortened(name, 80)!r}: {nearest(str(name), sources)}"
        )
    try:
        return sources[name].model_validate(value)
    except ValidationError as error:
        # pydantic would put the text of all errors into one; the recipe's loader unpacks them.
        context = {"errors": error.errors(), "fields": list(sources[name].model_fields)}
        raise PydanticCustomError("nested_section", "is not valid", context) from None


AnySource = Annotated[SerializeAsAny[Source], BeforeValidator(_parse_source)]
"""The type of a field that holds any registered source."""
