"""Exact-match scoring of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calibrate.samples import Sample


@dataclass(frozen=True)
class Result:
    """How one task went.

    Attributes:
        task: Its name.
        items: How many were asked.
        right: How many were answered exactly.
        empty: How many answers were empty or no text; never right.
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
    """Whether `answer` is the expected one, white space normalised; an empty answer or no text is
    never right.
    """
    if not isinstance(answer, str) or sample.answer is None:
        return False
    given, expected = " ".join(answer.split()), " ".join(sample.answer.split())
    return bool(given) and given == expected


def result(task: str, samples: Sequence[Sample], answers: Sequence[object]) -> Result:
    """Score the answers to `samples`; raises `ValueError` when there is not one answer a sample."""
    pairs = list(zip(answers, samples, strict=True))
    right = sum(score(answer, sample) for answer, sample in pairs)
    empty = sum(not isinstance(answer, str) or not answer.strip() for answer, _ in pairs)
    return Result(task, len(pairs), right, empty)
