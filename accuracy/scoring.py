"""Exact-match scoring of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calibrate.samples import Sample


@dataclass(frozen=True)
class Result:
    """The outcome of one task.

    Attributes:
        task: Its name.
        items: Number of items asked.
        right: Number of items answered exactly.
        empty: Number of answers that were empty or not text; they are never right.
    """

    task: str
    items: int
    right: int
    empty: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.items


def score(answer: object, sample: Sample) -> bool:
    """Return whether `answer` is the expected one, up to white space.

    An empty answer, or one that is not text, is never right.
    """
    if not isinstance(answer, str) or sample.answer is None:
        return False
    given = " ".join(answer.split())
    expected = " ".join(sample.answer.split())
    return bool(given) and given == expected


def is_empty(answer: object) -> bool:
    """Return whether an answer is empty or not text."""
    return not isinstance(answer, str) or not answer.strip()


def result(task: str, samples: Sequence[Sample], answers: Sequence[object]) -> Result:
    """Score the answers to `samples`.

    Raises:
        ValueError: There is not one answer per sample.
    """
    pairs = list(zip(answers, samples, strict=True))
    right = sum(score(answer, sample) for answer, sample in pairs)
    empty = sum(is_empty(answer) for answer, _ in pairs)
    return Result(task, len(pairs), right, empty)
