"""Published benchmarks as `hybridquant accuracy --suite` has measured them, for report and card.

What is needed of its outcome is declared here; everything else in the file is ignored. A run whose
recipe names benchmarks leaves the same outcome in the manifest.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from checkpoint.content import content_hash
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.reading import parse_json, read_small_file
from checkpoint.video import PruningRate
from export.publish.recorded import Task, mapping, mean_task, task_rows

_REMEDY = "give the file that hybridquant accuracy --json, or --suite, has written"
OWN_DATA = "hybridquant/own-data"
"""Stands for the dataset of a benchmark that was asked on the user's own data."""

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Points = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(max_length=400)]
Figures = Annotated[dict[Text, Percent], Field(max_length=20)]


class _Row(BaseModel):
    task: Text
    items: Count
    reference: Percent
    variant: Percent
    low: Points
    high: Points
    outcome: Text
    reason: Text = ""
    comparable: bool = True
    reference_failed: Count = 0
    variant_failed: Count = 0
    published: Figures = {}
    source: Text | None = None
    dataset: Text | None = None


class _Variant(BaseModel):
    directory: Text
    hash: Text
    rows: Annotated[list[_Row], Field(min_length=1, max_length=1000)]


class _Noise(BaseModel):
    task: Text
    items: Count
    different: Count
    scored_differently: Count


class _Point(BaseModel):
    task: Text
    directory: Text
    rate: PruningRate
    accuracy: Percent
    items: Count
    published: Figures = {}


class _Settings(BaseModel):
    system: Text
    max_tokens: Count
    limit: Count | None = None
    own_data: bool = False
    judge: Text | None = None


class _Outcome(BaseModel):
    """What accuracy/suites/report.py writes."""

    suite: Text
    settings: _Settings
    max_loss: Points
    variants: Annotated[list[_Variant], Field(min_length=1, max_length=100)]
    noise: Annotated[list[_Noise], Field(max_length=1000)] = []
    evs: Annotated[list[_Point], Field(max_length=10_000)] = []


@dataclass(frozen=True)
class Benchmark:
    """One benchmark under BF16 and the export.

    Attributes:
        task: Its figures as shares; `mean` for the mean over the benchmarks.
        outcome: What the suite's gate said; empty for the mean, which is not judged.
        reason: The outcome in words.
        comparable: Whether published figures were scored in the same way.
        failed: Requests that failed on either side; they count neither right nor wrong.
        published: Published figures in percent, by precision.
    """

    task: Task
    outcome: str
    reason: str
    comparable: bool
    failed: int
    published: Mapping[str, float]

    @property
    def published_text(self) -> str:
        """The published figures in words: `BF16 89.68, FP8 PTQ 89.44`."""
        return ", ".join(f"{precision} {value:g}" for precision, value in self.published.items())


@dataclass(frozen=True)
class RatePoint:
    """Accuracy on a benchmark of clips at an EVS rate, as shares."""

    rate: float
    accuracy: float
    items: int
    published: Mapping[str, float]


@dataclass(frozen=True)
class Benchmarks:
    """The outcome of one suite for one export.

    Attributes:
        suite: `report` or `text`.
        rows: By benchmark, the mean last.
        settings: How they were asked, a sentence.
        max_loss: Points that no benchmark may lose.
        noise: What one server answered otherwise when it was asked twice, a sentence a benchmark.
        curves: Accuracy by EVS rate, by benchmark, by rising rate.
        sources: Where the published figures come from.
    """

    suite: str
    rows: tuple[Benchmark, ...]
    settings: str
    max_loss: float
    noise: tuple[str, ...]
    curves: Mapping[str, tuple[RatePoint, ...]]
    sources: tuple[str, ...]

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The figures of all rows."""
        return tuple(row.task for row in self.rows)

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to be said beside the figures, a sentence each."""
        said = []
        for row in self.rows:
            name = row.task.name
            if row in self.missed:
                said.append(f"{name}: {row.reason}.")
            if row.failed:
                counted = "they count neither right nor wrong"
                said.append(f"{name}: {row.failed} requests failed; {counted}.")
            if not row.comparable:
                how = "scored by a rule, without a judge"
                said.append(f"{name}: {how}: not comparable with published figures.")
        sources = [f"Published figures: {source}." for source in self.sources]
        return (*said, *self.noise, *sources)

    @property
    def missed(self) -> tuple[Benchmark, ...]:
        """The benchmarks that the gate did not let pass."""
        return tuple(row for row in self.rows if row.outcome and row.outcome != "passed")

    @property
    def lost(self) -> bool:
        """Whether a benchmark has lost more than is allowed, for certain."""
        return any(row.outcome == "failed" for row in self.rows)


def add_accuracy_option(parser: argparse.ArgumentParser) -> None:
    """Add `--accuracy FILE`, whose files `read_accuracy` reads."""
    parser.add_argument(
        "--accuracy",
        type=Path,
        metavar="FILE",
        action="append",
        default=[],
        help="what accuracy --json, or --suite, has written; again for another file",
    )


def read_accuracy(
    paths: Sequence[Path], directory: Path
) -> tuple[tuple[Task, ...], tuple[Benchmarks, ...]]:
    """Read files of `hybridquant accuracy`: rows of exact tasks, and outcomes of suites.

    Args:
        paths: The files.
        directory: The export that they are shown for.

    Returns:
        The rows of the last file that has some, and the outcomes of the others.

    Raises:
        BadInput: With each file that is neither, or is of another checkpoint.
    """
    tasks: tuple[Task, ...] = ()
    outcomes = []
    faults: list[Fault] = []
    for path in paths:
        try:
            content = parse_json(read_small_file(path), path)
            if isinstance(content, dict) and "variants" in content:
                outcomes.append(_of_directory(_validated(content, path), path, directory))
                continue
            tasks = task_rows(content)
            if not tasks:
                raise BadInput(Fault(str(path), "has no rows of tasks", _REMEDY))
        except BadInput as bad:
            faults += bad.faults
    if faults:
        raise BadInput(*faults)
    return tasks, tuple(outcomes)


def recorded_benchmarks(gate: Mapping[str, Any]) -> tuple[Benchmarks, ...]:
    """Return what a run recorded in its manifest; nothing where that is not sound."""
    raw = mapping(gate, "suites")
    try:
        outcome = _Outcome.model_validate(raw)
    except ValidationError:
        return ()
    return (_benchmarks(outcome, outcome.variants[0]),)


def _validated(content: dict[str, Any], path: Path) -> _Outcome:
    try:
        return _Outcome.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "the file"
        what = f"{shortened(name)}: {shortened(first['msg'])}"
        raise BadInput(Fault(str(path), what, _REMEDY)) from None


def _of_directory(outcome: _Outcome, path: Path, directory: Path) -> Benchmarks:
    """What an outcome says of a directory: by content, so that a renamed one is still found."""
    content = content_hash(directory)
    for variant in outcome.variants:
        if variant.hash == content:
            return _benchmarks(outcome, variant)
    name = directory.resolve().name
    names = [variant.directory for variant in outcome.variants]
    if name in names:
        what = f"was measured before the files of {shortened(name, 60)} were changed"
    else:
        what = f"is of other checkpoints: {shortened(', '.join(sorted(names)))}"
    remedy = f"measure it: hybridquant accuracy {shortened(directory)} --suite …"
    raise BadInput(Fault(str(path), what, remedy))


def _benchmarks(outcome: _Outcome, variant: _Variant) -> Benchmarks:
    is_own = outcome.settings.own_data
    rows = [_benchmark(row, is_own) for row in variant.rows]
    noise = []
    for one in outcome.noise:
        noise.append(
            f"{one.task}: BF16's server was asked twice; {one.different} of {one.items} answers "
            f"differ, {one.scored_differently} are scored differently."
        )
    curves: dict[str, list[RatePoint]] = {}
    for point in sorted(outcome.evs, key=lambda point: point.rate):
        if point.directory == variant.directory:
            published = {name: value / 100 for name, value in point.published.items()}
            placed = RatePoint(point.rate, point.accuracy / 100, point.items, published)
            curves.setdefault(point.task, []).append(placed)
    return Benchmarks(
        suite=outcome.suite,
        rows=tuple(rows),
        settings=_sentence(outcome.settings),
        max_loss=outcome.max_loss,
        noise=tuple(noise),
        curves={task: tuple(points) for task, points in curves.items()},
        sources=tuple(dict.fromkeys(row.source for row in variant.rows if row.source)),
    )


def _benchmark(row: _Row, is_own: bool) -> Benchmark:
    task = Task(
        name=row.task,
        items=row.items,
        reference=row.reference / 100,
        variant=row.variant / 100,
        low=row.low / 100,
        high=row.high / 100,
        dataset=OWN_DATA if is_own else row.dataset or "",
    )
    is_mean = mean_task([task]) is not None
    return Benchmark(
        task=task,
        outcome="" if is_mean else row.outcome,
        reason=row.reason,
        comparable=row.comparable,
        failed=row.reference_failed + row.variant_failed,
        published=row.published if row.comparable else {},
    )


def _sentence(settings: _Settings) -> str:
    """How the benchmarks were asked."""
    reasoning = "with reasoning" if settings.system == "/think" else "without reasoning"
    parts = [f"Greedy, {reasoning}, at most {settings.max_tokens:,} new tokens"]
    if settings.limit:
        parts.append(f"{settings.limit:,} items of each")
    if settings.judge:
        parts.append(f"judged by {settings.judge}")
    if settings.own_data:
        parts.append("on data that is not the published")
    return "; ".join(parts) + "."
