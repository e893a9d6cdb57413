"""Compares two sets of answers to the same items: accuracies, difference, paired interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from accuracy.scoring import result, score
from calibrate.samples import Sample

_RESAMPLES = 10_000
_INTERVAL = (0.025, 0.975)
_COLUMNS = ("task", "items", "reference", "variant", "points", "95 % interval", "empty")


@dataclass(frozen=True)
class Paired:
    """One task, or the mean of all, under two models.

    Attributes:
        task: Its name; `mean` for the mean over tasks.
        items: Items asked of both.
        reference: Share that the reference answered exactly.
        variant: Share that the variant answered exactly.
        low: Lower end of the 95 % interval of variant − reference.
        high: Upper end.
        empty: Answers of the variant that were empty or not text.
    """

    task: str
    items: int
    reference: float
    variant: float
    low: float
    high: float
    empty: int

    @property
    def difference(self) -> float:
        """variant − reference."""
        return self.variant - self.reference


def pair(
    samples: Mapping[str, Sequence[Sample]],
    reference: Mapping[str, Sequence[object]],
    variant: Mapping[str, Sequence[object]],
) -> list[Paired]:
    """Score both sets of answers, task by task and, last, their unweighted mean.

    The interval is a paired bootstrap over items, 10,000 resamples from a fixed seed (Efron and
    Tibshirani 1993, chapter 13): both models answered the same items, so what is hard for both
    cancels.

    Args:
        samples: Items by task.
        reference: The reference's answers by task, in the order of the items.
        variant: The variant's.
    """
    random = np.random.default_rng(0)
    rows = []
    resampled_means = []
    for task, asked in samples.items():
        ours = _scores(reference[task], asked)
        theirs = _scores(variant[task], asked)
        difference = theirs - ours
        picked = random.integers(0, len(asked), (_RESAMPLES, len(asked)))
        means = difference[picked].mean(1)
        resampled_means.append(means)
        low, high = np.quantile(means, _INTERVAL)
        empty = result(task, asked, variant[task]).empty
        rows.append(
            Paired(
                task=task,
                items=len(asked),
                reference=ours.mean(),
                variant=theirs.mean(),
                low=float(low),
                high=float(high),
                empty=empty,
            )
        )
    low, high = np.quantile(np.mean(resampled_means, axis=0), _INTERVAL)
    mean = Paired(
        task="mean",
        items=sum(row.items for row in rows),
        reference=float(np.mean([row.reference for row in rows])),
        variant=float(np.mean([row.variant for row in rows])),
        low=float(low),
        high=float(high),
        empty=sum(row.empty for row in rows),
    )
    return [*rows, mean]


def _scores(answers: Sequence[object], samples: Sequence[Sample]) -> NDArray[np.float64]:
    """1 for each right answer, 0 for the others."""
    pairs = zip(answers, samples, strict=True)
    return np.array([score(answer, sample) for answer, sample in pairs], dtype=float)


def paired_table(rows: Sequence[Paired], reference: str, variant: str) -> Table:
    """The rows as a table for the console; accuracies in percent, differences in points."""
    table = Table(title=f"{variant} against {reference}", title_justify="left")
    for column in _COLUMNS:
        justify = "left" if column == "task" else "right"
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(
            row.task,
            str(row.items),
            f"{row.reference:.1%}",
            f"{row.variant:.1%}",
            f"{100 * row.difference:+.1f}",
            f"{100 * row.low:+.1f} … {100 * row.high:+.1f}",
            str(row.empty),
        )
    return table
