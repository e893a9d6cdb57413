"""Measurements that other commands leave as JSON files: the EVS sweep and the throughput.

The report shows them where they are given. What it needs of each file is the shape declared here;
everything else in it is ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field, ValidationError

from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.reading import parse_json, read_small_file

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=200)]


class SweepPoint(BaseModel):
    """One EVS rate."""

    rate: Annotated[float, Field(ge=0, lt=1)]
    """Share of a clip's visual tokens that was dropped."""
    accuracy: Share | None = None
    """Share of right answers at that rate."""
    low: Share | None = None
    """Lower end of the accuracy's 95 % interval."""
    high: Share | None = None
    """Its upper end."""
    first_token_s: Positive | None = None
    """Seconds to the first token about a clip."""
    prompt_tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens of the prompt."""


class Sweep(BaseModel):
    """`--sweep FILE`: accuracy and time to the first token against the EVS rate."""

    rates: Annotated[list[SweepPoint], Field(min_length=1, max_length=100)]
    device: Text = ""


class BenchRow(BaseModel):
    """One workload."""

    name: Text
    """What was served: model, workload and concurrency."""
    requests_per_s: Positive | None = None
    tokens_per_s: Positive | None = None
    first_token_s: Positive | None = None


class Bench(BaseModel):
    """`--bench FILE`: throughput by workload."""

    rows: Annotated[list[BenchRow], Field(min_length=1, max_length=100)]
    device: Text = ""


Measured = TypeVar("Measured", bound=BaseModel)


def read_measured(path: Path, shape: type[Measured]) -> Measured:
    """Read a file of measurements.

    Args:
        path: The file.
        shape: `Sweep` or `Bench`.

    Raises:
        BadInput: It is not JSON, or not of that shape.
    """
    try:
        return shape.model_validate(parse_json(read_small_file(path), path))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "the file"
        what = f"{shortened(name)}: {shortened(first['msg'])}"
        remedy = f"export/publish/measured.py declares {shape.__name__}"
        raise BadInput(Fault(str(path), what, remedy)) from None
