"""Compares a directory with BF16 task by task, and judges by the loss that is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from accuracy.suites.harness import Item
from accuracy.suites.intervals import FEW, Difference, Scores, items_to_tell, paired_difference

MAX_FAILED = 0.02
"""Share of an answer set that may be missing before the task is not judged."""

Outcome = Literal["passed", "failed", "too small", "incomplete"]

MEAN = "mean"


@dataclass(frozen=True)
class TaskScores:
    """What one model's answers to one task were worth.

    Attributes:
        scores: Between 0 and 1, by item.
        asked: Items asked.
        failed: Requests that failed: neither right nor wrong.
        truncated: Answers that were cut off at the most tokens.
        empty: Answers without text.
        unscored: Answers that the judge failed to read.
        reasons: Why requests failed: each reason once.
    """

    scores: Mapping[str, float]
    asked: int
    failed: int = 0
    truncated: int = 0
    empty: int = 0
    unscored: int = 0
    reasons: tuple[str, ...] = ()

    @property
    def missing(self) -> int:
        """Items without a score."""
        return self.failed + self.unscored


@dataclass(frozen=True)
class Row:
    """One task, or the mean of all, under BF16 and a variant.

    Attributes:
        task: Its name; `mean` for the unweighted mean over tasks.
        found: The comparison.
        outcome: What the gate says.
        reason: The outcome in words.
        comparable: Whether published figures were scored in the same way.
        reference_failed: Failed requests of the reference.
        variant_failed: Failed requests of the variant.
        truncated: Answers of the variant that were cut off.
        unscored: Answers of either that the judge failed to read.
        reasons: Why requests of either failed.
        published: Published figures in percent, by precision.
        items_needed: How many items would tell; None when it is known, or more would not help.
        parts: Shares of BF16 and the variant in parts of the task, such as lengths.
    """

    task: str
    found: Difference
    outcome: Outcome
    reason: str
    comparable: bool = True
    reference_failed: int = 0
    variant_failed: int = 0
    truncated: int = 0
    unscored: int = 0
    reasons: tuple[str, ...] = ()
    published: Mapping[str, float] = field(default_factory=dict)
    items_needed: int | None = None
    parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def compare_tasks(
    reference: Mapping[str, TaskScores],
    variant: Mapping[str, TaskScores],
    items: Mapping[str, Sequence[Item]],
    max_loss: float,
    published: Mapping[str, Mapping[str, float]],
    not_comparable: Sequence[str] = (),
) -> list[Row]:
    """Compare two models on the items that both answered; the mean over tasks is the last row.

    Args:
        reference: BF16's scores by task.
        variant: The variant's.
        items: The items by task.
        max_loss: Points that may be lost: the lower end of each interval must be above.
        published: Published figures by task.
        not_comparable: Tasks that were scored otherwise than the published figures.
    """
    rows = []
    resampled: list[Scores] = []
    for task, ours in reference.items():
        theirs = variant[task]
        compared = _compare_scores(ours.scores, theirs.scores, items[task])
        if compared is None:
            rows.append(_without_items(task, ours, theirs))
            continue
        found, differences = compared
        resampled.append(differences)
        most_missing = max(ours.missing / ours.asked, theirs.missing / theirs.asked)
        outcome, reason, needed = _judge(found, max_loss / 100, most_missing)
        rows.append(
            Row(
                task=task,
                found=found,
                outcome=outcome,
                reason=reason,
                comparable=task not in not_comparable,
                reference_failed=ours.failed,
                variant_failed=theirs.failed,
                truncated=theirs.truncated,
                unscored=ours.unscored + theirs.unscored,
                reasons=(*ours.reasons, *theirs.reasons),
                published=published.get(task, {}),
                items_needed=needed,
                parts=_parts(items[task], ours, theirs),
            )
        )
    if len(resampled) > 1:
        rows.append(_mean(rows, resampled))
    return rows


def _compare_scores(
    ours: Mapping[str, float], theirs: Mapping[str, float], items: Sequence[Item]
) -> tuple[Difference, Scores] | None:
    """The difference and its resamples over the items that both have a score for; None if there is
    no such item.
    """
    common = [item for item in ours if item in theirs]
    if not common:
        return None
    groups = None
    group_of = {item.id: item.group for item in items}
    if any(group_of.values()):
        groups = [group_of[item] for item in common]
    reference = np.array([ours[item] for item in common])
    variant = np.array([theirs[item] for item in common])
    return paired_difference(reference, variant, groups)


def gate_passed(rows: Sequence[Row]) -> bool:
    """Return whether no task may have lost more than is allowed. The mean is shown, not judged."""
    judged = [row for row in rows if row.task != MEAN]
    return bool(judged) and all(row.outcome == "passed" for row in judged)


def _judge(
    found: Difference, margin: float, most_missing: float
) -> tuple[Outcome, str, int | None]:
    if most_missing > MAX_FAILED:
        share = f"{most_missing:.0%} of the answers are missing, at most {MAX_FAILED:.0%} may be"
        return "incomplete", share, None
    if found.low >= -margin:
        return "passed", "no loss beyond the gate", None
    lost = f"{-100 * found.difference:.1f} points lost, {100 * margin:g} allowed"
    needed = items_to_tell(found, margin)
    if needed is None:
        return "failed", lost, None
    return "too small", f"too small to tell; {needed:,} items would do", needed


def _parts(
    items: Sequence[Item], ours: TaskScores, theirs: TaskScores
) -> dict[str, tuple[float, float]]:
    """The mean scores of both by part, over items that both answered."""
    members: dict[str, list[str]] = {}
    for item in items:
        if item.part and item.id in ours.scores and item.id in theirs.scores:
            members.setdefault(item.part, []).append(item.id)
    means = {}
    for part, names in members.items():
        first = float(np.mean([ours.scores[name] for name in names]))
        second = float(np.mean([theirs.scores[name] for name in names]))
        means[part] = (first, second)
    return means


def _without_items(task: str, ours: TaskScores, theirs: TaskScores) -> Row:
    nothing = Difference(0, 0.0, 0.0, -1.0, 1.0, 0, 0, None)
    return Row(
        task=task,
        found=nothing,
        outcome="incomplete",
        reason="no item was answered by both",
        reference_failed=ours.failed,
        variant_failed=theirs.failed,
        unscored=ours.unscored + theirs.unscored,
        reasons=(*ours.reasons, *theirs.reasons),
    )


def _mean(rows: Sequence[Row], resampled: Sequence[Scores]) -> Row:
    """The unweighted mean over tasks, as the launch post averages."""
    counted = [row.found for row in rows if row.found.items]
    low, high = np.quantile(np.mean(resampled, axis=0), (0.025, 0.975))
    if sum(task.worse + task.better for task in counted) < FEW:
        low = np.mean([task.low for task in counted])
        high = np.mean([task.high for task in counted])
    found = Difference(
        items=sum(task.items for task in counted),
        reference=float(np.mean([task.reference for task in counted])),
        variant=float(np.mean([task.variant for task in counted])),
        low=float(low),
        high=float(high),
        worse=sum(task.worse for task in counted),
        better=sum(task.better for task in counted),
        p_value=None,
    )
    return Row(MEAN, found, "passed", "not judged: each task is")
