"""The accuracy gate: measured figures against what a recipe requires, shown as one table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from accuracy.agreement import Agreement, agreement_rows
from accuracy.paired import Paired, paired_table
from accuracy.settings import Accuracy

_COLUMNS = ("samples", "prompts", "tokens", "KL (nats)", "top-1", "perplexity", "ratio")


@dataclass(frozen=True)
class Verdict:
    """The gate's outcome.

    Attributes:
        measured: Agreement by kind of sample; `all` decides.
        missed: One sentence per requirement that was not met.
        tasks: The tasks' rows, the mean last.
    """

    measured: dict[str, Agreement]
    missed: tuple[str, ...]
    tasks: tuple[Paired, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every requirement was met."""
        return not self.missed

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        measured = {name: dataclasses.asdict(figures) for name, figures in self.measured.items()}
        return {
            "passed": self.passed,
            "missed": list(self.missed),
            "agreement": measured,
            "tasks": [dataclasses.asdict(row) for row in self.tasks],
        }


def judge(
    measured: dict[str, Agreement], required: Accuracy, tasks: Sequence[Paired] = ()
) -> Verdict:
    """Compare the figures over all held-out samples with what the recipe requires.

    Args:
        measured: By kind of sample; the gate looks at `all`.
        required: The recipe's section.
        tasks: The tasks' rows, the mean last; empty if none were asked.
    """
    missed = tuple(_missed(measured["all"], required, tasks))
    return Verdict(measured, missed, tuple(tasks))


def _missed(overall: Agreement, required: Accuracy, tasks: Sequence[Paired]) -> Iterator[str]:
    if not overall.tokens:
        yield "no position was compared"
    yield from _above("KL", overall.kl, required.max_kl)
    yield from _below("top-1 agreement", overall.top1, required.min_top1)
    ratio = overall.perplexity_ratio
    yield from _above("perplexity ratio", ratio, required.max_perplexity_ratio)
    max_loss = required.tasks.max_loss if required.tasks else None
    if tasks and max_loss is not None:
        lost = -100 * tasks[-1].difference
        if not lost <= max_loss:  # a NaN must not pass
            yield f"the tasks' mean is {lost:.1f} points below BF16, allowed are {max_loss:g}"


def _above(name: str, value: float, limit: float | None) -> Iterator[str]:
    if limit is not None and not (math.isfinite(value) and value <= limit):
        yield f"{name} is {value:.4g}, allowed is at most {limit:g}"


def _below(name: str, value: float, limit: float | None) -> Iterator[str]:
    if limit is not None and not (math.isfinite(value) and value >= limit):
        yield f"{name} is {value:.4g}, allowed is at least {limit:g}"


def show(verdict: Verdict) -> None:
    """Print the tables and what was missed."""
    table = Table(title="agreement with BF16 on held-out samples", title_justify="left")
    for column in _COLUMNS:
        justify = "left" if column == "samples" else "right"
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in agreement_rows(verdict.measured):
        table.add_row(*row)
    console = Console()
    console.print(table)
    if verdict.tasks:
        console.print(paired_table(verdict.tasks, "BF16", "the result"))
    for sentence in verdict.missed:
        console.print(f"gate missed: {sentence}", style="red", highlight=False)
    if verdict.passed:
        console.print("gate passed", style="green")
