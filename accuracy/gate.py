"""The accuracy gate: measured figures against the thresholds a recipe demands, shown as one table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from accuracy.agreement import Agreement
from accuracy.paired import Paired, paired_table


@dataclass(frozen=True)
class Thresholds:
    """What a recipe demands of a quantized model; None demands nothing.

    Attributes:
        max_kl: Largest mean KL divergence, in nats.
        min_top1: Smallest top-1 agreement, 0 to 1.
        max_perplexity_ratio: Largest perplexity ratio.
        max_loss: Points that the mean over the tasks may be below BF16's.
    """

    max_kl: float | None = None
    min_top1: float | None = None
    max_perplexity_ratio: float | None = None
    max_loss: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The gate's outcome. `missed` holds one sentence a threshold that was not met."""

    measured: dict[str, Agreement]
    missed: tuple[str, ...]
    tasks: tuple[Paired, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every threshold was met."""
        return not self.missed

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        measured = {
            name: dataclasses.asdict(agreement) for name, agreement in self.measured.items()
        }
        tasks = [dataclasses.asdict(row) for row in self.tasks]
        return {
            "passed": self.passed,
            "missed": list(self.missed),
            "agreement": measured,
            "tasks": tasks,
        }


def judge(
    measured: dict[str, Agreement], thresholds: Thresholds, tasks: Sequence[Paired] = ()
) -> Verdict:
    """Hold the figures over all held-out samples against the thresholds.

    Args:
        measured: By kind of sample; `all` is what the gate looks at.
        thresholds: The recipe's.
        tasks: The tasks' rows, the mean last; empty when none were asked.
    """
    overall = measured["all"]
    limits = (
        ("KL", overall.kl, thresholds.max_kl, True),
        ("top-1 agreement", overall.top1, thresholds.min_top1, False),
        ("perplexity ratio", overall.perplexity_ratio, thresholds.max_perplexity_ratio, True),
    )
    missed = [] if overall.tokens else ["no position was compared"]
    for name, value, limit, at_most in limits:
        # A NaN meets no comparison, so ask for what is allowed, not for what is forbidden.
        met = limit is None or (
            math.isfinite(value) and (value <= limit if at_most else value >= limit)
        )
        if not met:
            missed.append(
                f"{name} is {value:.4g}, allowed is at {'most' if at_most else 'least'} {limit:g}"
            )
    if (
        tasks
        and thresholds.max_loss is not None
        and not -100 * tasks[-1].difference <= thresholds.max_loss
    ):
        lost = -100 * tasks[-1].difference
        missed.append(
            f"the tasks' mean is {lost:.1f} points below BF16, allowed are {thresholds.max_loss:g}"
        )
    return Verdict(measured, tuple(missed), tuple(tasks))


def show(verdict: Verdict) -> None:
    """Print the table and what was missed."""
    table = Table(title="agreement with BF16 on held-out samples", title_justify="left")
    for column in ("samples", "prompts", "tokens", "KL (nats)", "top-1", "perplexity", "ratio"):
        table.add_column(column, justify="left" if column == "samples" else "right", no_wrap=True)
    for name, a in verdict.measured.items():
        figures = (
            f"{a.kl:.5f}",
            f"{a.top1:.2%}",
            f"{a.perplexity:.4g}",
            f"{a.perplexity_ratio:.4f}",
        )
        table.add_row(name.removeprefix("synthetic "), str(a.prompts), str(a.tokens), *figures)
    console = Console()
    console.print(table)
    if verdict.tasks:
        console.print(paired_table(verdict.tasks, "BF16", "the result"))
    for sentence in verdict.missed:
        console.print(f"gate missed: {sentence}", style="red", highlight=False)
    if verdict.passed:
        console.print("gate passed", style="green")
