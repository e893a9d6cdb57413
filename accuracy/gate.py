"""The accuracy gate: measured figures against what a recipe requires, shown as one table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, JustifyMethod
from rich.table import Table

from accuracy.agreement import Agreement, agreement_rows
from accuracy.paired import Paired, paired_table
from accuracy.settings import Accuracy

_COLUMNS = ("samples", "prompts", "tokens", "KL (nats)", "top-1", "perplexity", "ratio")


@dataclass(frozen=True)
class Limit:
    """One requirement of a recipe beside what was measured.

    Attributes:
        name: What is limited.
        value: As measured.
        allowed: The largest value that is allowed; the smallest if `is_smallest`.
        is_smallest: Whether larger values are better.
    """

    name: str
    value: float
    allowed: float
    is_smallest: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the value is allowed; NaN and infinity never are."""
        if not math.isfinite(self.value):
            return False
        if self.is_smallest:
            return self.value >= self.allowed
        return self.value <= self.allowed

    @property
    def missed(self) -> str:
        """The sentence about a limit that is not met."""
        bound = "at least" if self.is_smallest else "at most"
        return f"{self.name} is {self.value:.4g}, allowed is {bound} {self.allowed:g}"

    def __str__(self) -> str:
        sign = "≥" if self.is_smallest else "≤"
        return f"{self.name} {self.value:.4g} {sign} {self.allowed:g}"


@dataclass(frozen=True)
class Verdict:
    """The gate's outcome.

    Attributes:
        measured: Agreement by kind of sample; `all` decides.
        limits: The recipe's requirements.
        tasks: The tasks' rows, the mean last.
    """

    measured: dict[str, Agreement]
    limits: tuple[Limit, ...]
    tasks: tuple[Paired, ...] = ()

    @property
    def missed(self) -> tuple[str, ...]:
        """One sentence per requirement that was not met."""
        sentences = [limit.missed for limit in self.limits if not limit.is_met]
        if not self.measured["all"].tokens:
            sentences.insert(0, "no position was compared")
        return tuple(sentences)

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
    overall = measured["all"]
    limits = []
    if required.max_kl is not None:
        limits.append(Limit("KL", overall.kl, required.max_kl))
    if required.min_top1 is not None:
        limits.append(Limit("top-1 agreement", overall.top1, required.min_top1, is_smallest=True))
    if required.max_perplexity_ratio is not None:
        ratio = overall.perplexity_ratio
        limits.append(Limit("perplexity ratio", ratio, required.max_perplexity_ratio))
    if tasks and required.tasks is not None and required.tasks.max_loss is not None:
        lost = 100 * (tasks[-1].reference - tasks[-1].variant)
        limits.append(Limit("task loss in points", lost, required.tasks.max_loss))
    return Verdict(measured, tuple(limits), tuple(tasks))


def show(verdict: Verdict) -> None:
    """Print the tables, and each limit that was missed; if none was, how near all of them are."""
    table = Table(title="agreement with BF16 on held-out samples", title_justify="left")
    for column in _COLUMNS:
        justify: JustifyMethod = "left" if column == "samples" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for row in agreement_rows(verdict.measured):
        table.add_row(*row)
    console = Console()
    console.print(table)
    if verdict.tasks:
        console.print(paired_table(verdict.tasks, "BF16", "the result"))
    for sentence in verdict.missed:
        console.print(f"gate missed: {sentence}", style="red", highlight=False)
    if verdict.passed:
        limits = ", ".join(str(limit) for limit in verdict.limits)
        sentence = f"gate passed: {limits or 'the recipe sets no limits'}"
        console.print(sentence, style="green", highlight=False, soft_wrap=True)
