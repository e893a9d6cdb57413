"""Measurements that other commands leave as JSON files: the EVS sweep and the throughput.

The report shows them where they are given. What it needs of the files of `hybridquant sweep` and
`hybridquant bench` is declared here; everything else in them is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field, ValidationError

from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.reading import parse_json, read_small_file

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Points = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(max_length=200)]


class _SweptRate(BaseModel):
    directory: Text
    rate: Rate
    accuracy: Share
    loss_low: Points
    loss_high: Points
    prompt_tokens_mean: Positive | None = None


class _SweptLoad(BaseModel):
    directory: Text
    rate: Rate
    concurrency: Count
    ttft_ms_median: Positive | None = None


class _SweepFile(BaseModel):
    """sweep.json, as the docstring of serve/sweep.py describes it."""

    measured: Annotated[list[_SweptRate], Field(min_length=1, max_length=1000)]
    load: Annotated[list[_SweptLoad], Field(max_length=10_000)] = []
    device: Text = ""


class _BenchMeasured(BaseModel):
    server: Text
    concurrency: Count
    requests_per_s: Positive | None = None
    output_tokens_per_s: Positive | None = None
    ttft_ms_median: Positive | None = None


class _BenchFile(BaseModel):
    """The JSON file of serve/bench.py."""

    measured: Annotated[list[_BenchMeasured], Field(min_length=1, max_length=1000)]
    workload: Text = ""
    device: Text = ""


@dataclass(frozen=True)
class SweepPoint:
    """One EVS rate.

    Attributes:
        rate: Share of a clip's visual tokens that was dropped.
        accuracy: Share of right answers at that rate.
        low: Lower end of its 95 % interval, from that of the loss against rate 0.
        high: Its upper end.
        first_token_s: Median seconds to the first token about a clip, at the least concurrency;
            None where it was not measured.
        prompt_tokens: Mean tokens of the prompts; None where they were not counted.
    """

    rate: float
    accuracy: float
    low: float
    high: float
    first_token_s: float | None
    prompt_tokens: int | None


@dataclass(frozen=True)
class Sweep:
    """Accuracy and time to the first token against the EVS rate, of one checkpoint.

    Attributes:
        rates: By rising rate.
        device: What it was measured on.
    """

    rates: tuple[SweepPoint, ...]
    device: str


@dataclass(frozen=True)
class BenchRow:
    """One server under one load.

    Attributes:
        name: Server, workload and concurrency.
        requests_per_s: Requests answered in a second.
        tokens_per_s: Tokens of answers in a second.
        first_token_s: Median seconds to the first token.
    """

    name: str
    requests_per_s: float | None
    tokens_per_s: float | None
    first_token_s: float | None


@dataclass(frozen=True)
class Bench:
    """Throughput by server and concurrency.

    Attributes:
        rows: In the order of the file.
        device: What it was measured on.
    """

    rows: tuple[BenchRow, ...]
    device: str


def read_sweep(path: Path, name: str) -> Sweep:
    """Read what `hybridquant sweep` has written.

    Args:
        path: sweep.json.
        name: Name of the directory that is shown. If the file has another one alone, that is taken.

    Raises:
        BadInput: It is not JSON, not a sweep, or of several other directories.
    """
    file = _read(path, _SweepFile, "hybridquant sweep")
    directories = {point.directory for point in file.measured}
    if name not in directories and len(directories) > 1:
        shown = shortened(", ".join(sorted(directories)))
        remedy = f"sweep {shortened(name, 60)} with it"
        raise BadInput(Fault(str(path), f"is of other directories: {shown}", remedy))
    chosen = name if name in directories else directories.pop()
    measured = [point for point in file.measured if point.directory == chosen]
    load = [point for point in file.load if point.directory == chosen]
    points = []
    for point in sorted(measured, key=lambda point: point.rate):
        unpruned = point.accuracy + _loss(point, measured)
        points.append(
            SweepPoint(
                rate=point.rate,
                accuracy=point.accuracy,
                low=max(0.0, unpruned - point.loss_high / 100),
                high=min(1.0, unpruned - point.loss_low / 100),
                first_token_s=_first_token(point.rate, load),
                prompt_tokens=round(point.prompt_tokens_mean) if point.prompt_tokens_mean else None,
            )
        )
    return Sweep(tuple(points), file.device)


def _loss(point: _SweptRate, measured: list[_SweptRate]) -> float:
    """The share that a rate loses against the lowest one."""
    reference = min(measured, key=lambda other: other.rate)
    return reference.accuracy - point.accuracy


def _first_token(rate: float, load: list[_SweptLoad]) -> float | None:
    """Seconds to the first token at a rate, at the least concurrency."""
    same = [point for point in load if point.rate == rate]
    if not same:
        return None
    quietest = min(same, key=lambda point: point.concurrency)
    return quietest.ttft_ms_median / 1000 if quietest.ttft_ms_median else None


def read_bench(path: Path) -> Bench:
    """Read what `hybridquant bench` has written.

    Args:
        path: The file of its `--json`.

    Raises:
        BadInput: It is not JSON, or not a bench.
    """
    file = _read(path, _BenchFile, "hybridquant bench")
    rows = []
    for measured in file.measured:
        first = measured.ttft_ms_median
        rows.append(
            BenchRow(
                name=f"{measured.server}, {file.workload}, {measured.concurrency} at once",
                requests_per_s=measured.requests_per_s,
                tokens_per_s=measured.output_tokens_per_s,
                first_token_s=first / 1000 if first else None,
            )
        )
    return Bench(tuple(rows), file.device)


_File = TypeVar("_File", bound=BaseModel)


def _read(path: Path, shape: type[_File], command: str) -> _File:
    try:
        return shape.model_validate(parse_json(read_small_file(path), path))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "the file"
        what = f"{shortened(name)}: {shortened(first['msg'])}"
        raise BadInput(Fault(str(path), what, f"give a file of {command}")) from None
