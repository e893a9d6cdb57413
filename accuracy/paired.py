"""Two sets of answers to the same items, held against each other: accuracies, their difference, a
paired interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from accuracy.scoring import result, score
from calibrate.samples import Sample

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Paired:
    """One task, or the mean of all, under two models.

    Attributes:
        task: Its name; `mean` for the mean over tasks.
        items: Items asked of both.
        reference: Share the reference answered exactly.
        variant: Share the variant answered exactly.
        low: Lower end of the 95 % interval of variant − reference.
        high: Upper end.
        empty: Answers of the variant that were empty or no text.
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
    rows, draws = [], []
    for task, asked in samples.items():
        ours = np.array(
            [score(answer, sample) for answer, sample in zip(reference[task], asked, strict=True)]
        )
        theirs = np.array(
            [score(answer, sample) for answer, sample in zip(variant[task], asked, strict=True)]
        )
        difference = theirs.astype(float) - ours
        picked = random.integers(0, len(asked), (_RESAMPLES, len(asked)))
        drawn = difference[picked].mean(1)
        draws.append(drawn)
        low, high = np.quantile(drawn, (0.025, 0.975))
        empty = result(task, asked, variant[task]).empty
        rows.append(
            Paired(task, len(asked), ours.mean(), theirs.mean(), float(low), float(high), empty)
        )
    low, high = np.quantile(np.mean(draws, axis=0), (0.025, 0.975))
    means = [
        float(np.mean([getattr(row, side) for row in rows])) for side in ("reference", "variant")
    ]
    total, empties = sum(row.items for row in rows), sum(row.empty for row in rows)
    return [*rows, Paired("mean", total, means[0], means[1], float(low), float(high), empties)]


def paired_table(rows: Sequence[Paired], reference: str, variant: str) -> Table:
    """The rows as a table for the console; accuracies in percent, differences in points."""
    table = Table(title=f"{variant} against {reference}", title_justify="left")
    for column in ("task", "items", "reference", "variant", "points", "95 % interval", "empty"):
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    for row in rows:
        interval = f"{100 * row.low:+.1f} … {100 * row.high:+.1f}"
        shares = (f"{row.reference:.1%}", f"{row.variant:.1%}", f"{100 * row.difference:+.1f}")
        table.add_row(row.task, str(row.items), *shares, interval, str(row.empty))
    return table
