"""Shows a suite's outcome, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, JustifyMethod
from rich.table import Table

from accuracy.suites.outcome import Asked, Compared, CurvePoint, Noise
from accuracy.suites.published import source_of
from accuracy.suites.run import SuitePlan, SuiteRun
from accuracy.suites.serving import Model
from accuracy.suites.verdict import MEAN, Row
from checkpoint.naming import directory_names

_COLUMNS = ("task", "items", "BF16", "variant", "points", "95 % interval", "verdict")
_SHOWN_REASONS = 3


def show(compared: Sequence[Compared], reference: Model, max_loss: float) -> None:
    """Print a table for each checkpoint, and what its gate says.

    Args:
        compared: The checkpoints.
        reference: BF16.
        max_loss: Points that no task may lose, for the gate's line.
    """
    console = Console()
    directories = [reference.directory, *(one.model.directory for one in compared)]
    reference_name, *names = directory_names(directories)
    for name, one in zip(names, compared, strict=True):
        title = f"{name} against {reference_name}, in percent"
        table = Table(title=title, title_justify="left")
        for column in _COLUMNS:
            justify: JustifyMethod = "left" if column in ("task", "verdict") else "right"
            table.add_column(column, justify=justify, no_wrap=True)
        for row in one.rows:
            table.add_row(*_cells(row))
        console.print(table)
        for row in one.rows:
            for note in _notes(row):
                console.print(f"{row.task}: {note}", highlight=False)
        if one.passed:
            console.print(_passed_line(one.rows, max_loss), style="green", highlight=False)
        else:
            missed = [row.task for row in one.rows if row.outcome != "passed"]
            console.print(f"gate missed: {', '.join(missed)}", style="red", highlight=False)


def _passed_line(rows: Sequence[Row], max_loss: float) -> str:
    """What is said of a gate that passed: how near its nearest task came to the limit."""
    nearest = min((row for row in rows if row.task != MEAN), key=lambda row: row.found.low)
    lowest = 100 * nearest.found.low
    allowed = f"{-max_loss:+g} allowed"
    return f"gate passed: no interval begins below {lowest:+.1f} points ({nearest.task}), {allowed}"


def _cells(row: Row) -> tuple[str, ...]:
    found = row.found
    if not found.items:
        return (row.task, "0", "–", "–", "–", "–", row.outcome)
    return (
        row.task,
        f"{found.items:,}",
        f"{100 * found.reference:.2f}",
        f"{100 * found.variant:.2f}",
        f"{100 * found.difference:+.2f}",
        f"{100 * found.low:+.1f} … {100 * found.high:+.1f}",
        "" if row.task == MEAN else row.outcome,
    )


def _notes(row: Row) -> list[str]:
    """What is to be said about a row below the table."""
    notes = []
    if row.published and row.comparable:
        parts = [f"{precision} {value:g}" for precision, value in row.published.items()]
        notes.append(f"published: {', '.join(parts)}")
    for part, (ours, theirs) in row.parts.items():
        notes.append(f"{part}: BF16 {100 * ours:.1f}, variant {100 * theirs:.1f}")
    if row.outcome != "passed":
        notes.append(row.reason)
    if row.reference_failed or row.variant_failed:
        counts = f"{row.reference_failed} of BF16's and {row.variant_failed} of the variant's"
        notes.append(f"{counts} requests failed; they count neither right nor wrong")
        notes += [f"failed: {reason}" for reason in row.reasons[:_SHOWN_REASONS]]
    if row.unscored:
        notes.append(f"the judge did not read {row.unscored} answers; they are left out")
    if row.truncated:
        notes.append(f"{row.truncated} of the variant's answers were cut off")
    if not row.comparable:
        notes.append("scored by rule, without a judge: not comparable with published figures")
    return notes


def show_noise(noise: Sequence[Noise]) -> None:
    """Print how many answers of one server differ from its own."""
    console = Console()
    for one in noise:
        console.print(
            f"{one.task}: asked twice, {one.different} of {one.items} answers differ, "
            f"{one.scored_differently} are scored differently",
            highlight=False,
        )


def show_curve(points: Sequence[CurvePoint]) -> None:
    """Print accuracy by EVS rate, the published curve beside it."""
    table = Table(title="accuracy by EVS rate, in percent", title_justify="left")
    for column in ("task", "rate", "checkpoint", "items", "accuracy", "published"):
        table.add_column(column, justify="right" if column in ("items", "accuracy") else "left")
    for point in points:
        published = [f"{precision} {value:g}" for precision, value in point.published.items()]
        table.add_row(
            point.task,
            f"{point.rate:g}",
            point.directory.name,
            f"{point.items:,}",
            f"{point.accuracy:.2f}",
            ", ".join(published),
        )
    Console().print(table)


def as_dict(
    run: SuiteRun,
    suite: str,
    reference: Model,
    compared: Sequence[Compared],
    noise: Sequence[Noise] = (),
    points: Sequence[CurvePoint] = (),
) -> dict[str, Any]:
    """Return everything for a JSON file; figures in percent."""
    plan: SuitePlan = run.plan
    return {
        "suite": suite,
        "settings": {
            "system": plan.profile.system,
            "max_tokens": plan.profile.max_tokens,
            "temperature": 0,
            "limit": plan.source.limit,
            "own_data": plan.source.is_own,
            "video": plan.video.model_dump(),
            "judge": None if plan.judge is None else plan.judge.model,
        },
        "reference": _model(run, reference),
        "max_loss": plan.max_loss,
        "passed": all(one.passed for one in compared),
        "variants": [_compared(run, one) for one in compared],
        "noise": [vars(one) for one in noise],
        "evs": [_point(point) for point in points],
        "asked": [_asked(asked) for asked in run.asked],
    }


def _model(run: SuiteRun, model: Model) -> dict[str, str]:
    return {"directory": model.directory.name, "hash": run.hash_of(model)}


def _compared(run: SuiteRun, one: Compared) -> dict[str, Any]:
    sources = {task.name: task.source for task in run.plan.tasks}
    rows = [_row(row) | {"dataset": sources.get(row.task)} for row in one.rows]
    return _model(run, one.model) | {"passed": one.passed, "rows": rows}


def _row(row: Row) -> dict[str, Any]:
    found = row.found
    return {
        "task": row.task,
        "items": found.items,
        "reference": 100 * found.reference,
        "variant": 100 * found.variant,
        "difference": 100 * found.difference,
        "low": 100 * found.low,
        "high": 100 * found.high,
        "worse": found.worse,
        "better": found.better,
        "mcnemar_p": found.p_value,
        "outcome": row.outcome,
        "reason": row.reason,
        "items_needed": row.items_needed,
        "reference_failed": row.reference_failed,
        "variant_failed": row.variant_failed,
        "truncated": row.truncated,
        "unscored": row.unscored,
        "reasons": list(row.reasons),
        "parts": {name: [100 * one, 100 * two] for name, (one, two) in row.parts.items()},
        "comparable": row.comparable,
        "published": dict(row.published),
        "source": source_of(row.task) if row.published else None,
    }


def _point(point: CurvePoint) -> dict[str, Any]:
    return {
        "task": point.task,
        "directory": point.directory.name,
        "rate": point.rate,
        "accuracy": point.accuracy,
        "items": point.items,
        "published": dict(point.published),
    }


def _asked(asked: Asked) -> dict[str, Any]:
    """How fast a task was answered; `steps` says how the number at a time was chosen."""
    steps = [vars(step) | {"answers_per_s": step.rate} for step in asked.steps]
    return vars(asked) | {"directory": asked.directory.name, "steps": steps}
