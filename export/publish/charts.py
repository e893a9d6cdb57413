"""Where the report's charts have their marks: numbers for the template's SVG, no text.

Every length is in units of the chart's own coordinate system.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from export.publish.facts import LayerFacts
from export.publish.measured import Sweep
from export.publish.recorded import Task
from export.publish.suites import RatePoint
from quantize.formats.registry import find_format

STEPS = 6
"""Colours of the error scale."""

COLUMN = 16
"""Width of a layer's column."""

BAR = 96
"""Height of the largest error's bar."""

_LEAST_SCALE = 0.1
"""The error of 4-bit weights: an export in FP8 alone is not painted as if it had as much."""

_LETTERS = {"mamba": "M", "mlp": "–", "attention": "*"}


@dataclass(frozen=True)
class Column:
    """One layer in the chart of the hybrid stack.

    Attributes:
        layer: What it shows.
        x: Its left edge.
        letter: The character of its kind, as in `hybrid_override_pattern`.
        code: Its format in two characters, as `format_code` gives it.
        height: Of the error's bar.
        step: Colour of the error, 0 (none) to `STEPS`.
    """

    layer: LayerFacts
    x: int
    letter: str
    code: str
    height: float
    step: int


@dataclass(frozen=True)
class Stack:
    """The hybrid stack, a column a layer.

    Attributes:
        columns: In order.
        width: Of the whole chart.
        largest: The error that the highest bar stands for.
    """

    columns: tuple[Column, ...]
    width: int
    largest: float

    @property
    def room(self) -> int:
        """Width of the drawing, with what stands left of the columns and the sentence below."""
        return max(self.width + 46, 480)

    @property
    def shown_width(self) -> int:
        """Width on the page in pixels; a small model's chart is magnified."""
        return self.room if len(self.columns) > 30 else self.room * 3 // 2


def stack_chart(layers: Sequence[LayerFacts]) -> Stack:
    """Place the layers."""
    errors = [layer.error for layer in layers if layer.error is not None]
    largest = max([_LEAST_SCALE, *errors])
    columns = tuple(_column(place, layer, largest) for place, layer in enumerate(layers))
    return Stack(columns, len(columns) * COLUMN, largest)


def _column(place: int, layer: LayerFacts, largest: float) -> Column:
    """Place a layer; `largest` is the error that the highest bar stands for."""
    share = 0.0
    step = 0
    if layer.error is not None:
        share = layer.error / largest
        nearest = 1 + int(share * (STEPS - 1) + 0.5)
        step = max(1, min(STEPS, nearest))
    code = "+"  # linears of several formats
    if len(layer.formats) == 1:
        code = format_code(layer.formats[0])
    return Column(
        layer=layer,
        x=place * COLUMN,
        letter=_LETTERS.get(layer.kind, layer.kind[:1].upper()),
        code=code,
        height=share * BAR,
        step=step,
    )


def format_code(label: str) -> str:
    """Return a format in two characters: its whole bits per weight, and w for weights alone."""
    format = find_format(label)
    if format is None:
        return "16"
    bits = str(int(format.bits))
    return f"{bits}w" if format.input_quantizer is None else bits


@dataclass(frozen=True)
class Whisker:
    """A difference with its interval, on an axis from −`limit` to `limit` that is 100 wide.

    Attributes:
        low: Left end.
        middle: The difference.
        high: Right end.
    """

    low: float
    middle: float
    high: float


def whiskers(tasks: Iterable[Task]) -> tuple[list[Whisker], float]:
    """Place the differences of tasks.

    Returns:
        One whisker a task, and the limit of the axis as a share.
    """
    ranges = []
    limit = 0.01
    for task in tasks:
        low = task.difference if task.low is None else task.low
        high = task.difference if task.high is None else task.high
        ranges.append((low, task.difference, high))
        limit = max(limit, abs(low), abs(task.difference), abs(high))
    found = []
    for low, middle, high in ranges:
        found.append(Whisker(_place(low, limit), _place(middle, limit), _place(high, limit)))
    return found, limit


def _place(value: float, limit: float) -> float:
    """Where a value stands on the axis of a `Whisker`."""
    return 50 + 50 * value / limit


@dataclass(frozen=True)
class Point:
    """A point of a curve, with the ends of its interval where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """A curve over the EVS rate, in a box of 300 by 150 whose y axis points down.

    Attributes:
        points: By rising rate.
        bottom: The value at the lower edge.
        top: The value at the upper edge.
    """

    points: tuple[Point, ...]
    bottom: float
    top: float

    @property
    def line(self) -> str:
        """For the attribute `points` of a polyline."""
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)


def accuracy_curve(sweep: Sweep) -> Curve:
    """Place accuracy and its interval against the EVS rate."""
    values = []
    for point in sweep.rates:
        values += [point.accuracy, point.low, point.high]
    bottom, top = _range(values)
    placed = []
    for point in sweep.rates:
        placed.append(
            Point(
                x=_x(point.rate),
                y=_y(point.accuracy, bottom, top),
                low=_y(point.low, bottom, top),
                high=_y(point.high, bottom, top),
            )
        )
    return Curve(tuple(placed), bottom, top)


def benchmark_curves(
    curves: Mapping[str, Sequence[RatePoint]],
) -> list[tuple[str, Curve, list[tuple[str, Curve]]]]:
    """Place a benchmark's accuracy against the EVS rate, and the published curves beside it.

    Returns:
        For each benchmark its name, the measured curve, and the published ones by precision; all of
        one benchmark on the same axis.
    """
    found = []
    for task, points in curves.items():
        measured = [(point.rate, point.accuracy) for point in points]
        published: dict[str, list[tuple[float, float]]] = {}
        for point in points:
            for precision, value in point.published.items():
                published.setdefault(precision, []).append((point.rate, value))
        lines = [measured, *published.values()]
        bottom, top = _range([value for line in lines for _, value in line])
        placed = []
        for line in lines:
            marks = [Point(_x(rate), _y(value, bottom, top)) for rate, value in line]
            placed.append(Curve(tuple(marks), bottom, top))
        beside = list(zip(published, placed[1:], strict=True))
        found.append((task, placed[0], beside))
    return found


def first_token_curve(sweep: Sweep) -> Curve | None:
    """Place the time to the first token against the EVS rate; None where it was not measured."""
    known = [point for point in sweep.rates if point.first_token_s is not None]
    if not known:
        return None
    top = max(point.first_token_s or 0.0 for point in known)
    placed = []
    for point in known:
        placed.append(Point(_x(point.rate), _y(point.first_token_s or 0.0, 0.0, top)))
    return Curve(tuple(placed), 0.0, top)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The axis of accuracies: their range and a little more, within 0 and 1."""
    margin = max(0.02, 0.1 * (max(values) - min(values)))
    return max(0.0, min(values) - margin), min(1.0, max(values) + margin)


def _x(rate: float) -> float:
    return 300 * rate


def _y(value: float, bottom: float, top: float) -> float:
    return 150 * (1 - (value - bottom) / (top - bottom))
