"""Compares the points of a sweep with rate 0, chooses a rate, and makes the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from serve.sweep_choice import Loss, choose
from serve.sweep_items import Items
from serve.sweep_points import Point

if TYPE_CHECKING:
    from rich.table import Table

    from accuracy.paired import Paired

_PADDING = (0, 0, 0, 1)
"""Around the cells of a table, so that it fits 80 columns."""

Rows = list[dict[str, Any]]


def result_of(
    points: Mapping[tuple[str, float], Point],
    precisions: Mapping[str, str],
    items: Items,
    tolerance: float,
) -> dict[str, Rows]:
    """Compare every rate of a directory with its rate 0, and choose.

    Args:
        points: By name of the directory and rate; of each directory one at rate 0.
        precisions: By name of the directory.
        items: What was asked.
        tolerance: Largest loss in points.

    Returns:
        `measured`, `tasks_measured`, `load` and `recommended` of the file.
    """
    result: dict[str, Rows] = {}
    for table_name in ("measured", "tasks_measured", "load", "recommended"):
        result[table_name] = []
    for directory, precision in precisions.items():
        found = {rate: point for (name, rate), point in points.items() if name == directory}
        losses = []
        for rate, point in found.items():
            tasks, mean = _compared(point, found[0.0], items)
            described = {"directory": directory, "precision": precision, "rate": rate}
            length = round(point["prompt_tokens_mean"], 1)
            more = {"empty": mean.empty, "prompt_tokens_mean": length}
            result["measured"].append(described | _loss_row(mean) | more)
            at_rate = {"directory": directory, "rate": rate}
            result["tasks_measured"] += [at_rate | {"task": t.task} | _loss_row(t) for t in tasks]
            result["load"] += [at_rate | _load_row(load) for load in point["load"]]
            if rate > 0:
                losses.append(_loss(rate, mean))
        choice = choose(losses, tolerance)
        chosen = {"rate": choice.rate, "sentences": list(choice.sentences)}
        result["recommended"].append({"directory": directory} | chosen)
    return result


def _compared(point: Point, reference: Point, items: Items) -> tuple[list[Paired], Paired]:
    """The rows of the tasks, and that of their mean."""
    from accuracy.paired import pair

    *tasks, mean = pair(items, reference["answers"], point["answers"])
    return tasks, mean


def _loss(rate: float, mean: Paired) -> Loss:
    """`Paired` counts gains as shares, `Loss` losses in points."""
    points = _points(-mean.difference)
    return Loss(rate, mean.items, points, _points(-mean.high), _points(-mean.low))


def _loss_row(paired: Paired) -> dict[str, Any]:
    return {
        "items": paired.items,
        "accuracy": round(float(paired.variant), 4),
        "loss": _points(-paired.difference),
        "loss_low": _points(-paired.high),
        "loss_high": _points(-paired.low),
    }


def _points(share: float) -> float:
    return round(100 * float(share), 2) + 0.0  # no "-0.0"


def _load_row(load: Mapping[str, Any]) -> dict[str, Any]:
    names = ("concurrency", "requests", "failed", "ttft_ms_median", "ttft_ms_p99")
    return {name: load[name] for name in (*names, "requests_per_s", "output_tokens_per_s")}


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the figures as a table for the console, one for each directory."""
    from rich import box
    from rich.table import Table

    for chosen in result["recommended"]:
        directory = chosen["directory"]
        title = f"{directory} by EVS rate; loss in points, with its 95 % interval"
        shown = Table(title=title, title_justify="left", box=box.SIMPLE, padding=_PADDING)
        columns = ["rate", "accuracy", "loss", "prompt"]
        columns += [f"{concurrency} at a time" for concurrency in result["concurrency"]]
        for column in columns:
            shown.add_column(column, justify="right")
        for row in _of(result["measured"], directory):
            loads = [load for load in _of(result["load"], directory) if load["rate"] == row["rate"]]
            interval = f"{row['loss']:.1f} ({row['loss_low']:.1f} … {row['loss_high']:.1f})"
            shown.add_row(
                f"{row['rate']:g}",
                f"{row['accuracy']:.1%}",
                interval if row["rate"] else "",
                f"{row['prompt_tokens_mean']:.0f}",
                *[_speed(load) for load in loads],
            )
        yield shown


def _of(rows: Rows, directory: str) -> Rows:
    return [row for row in rows if row["directory"] == directory]


def _speed(load: Mapping[str, Any]) -> str:
    return f"{load['ttft_ms_median']:.0f} ms, {load['requests_per_s']:.2f}/s"
