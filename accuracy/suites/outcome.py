"""What a suite has measured, apart from the scores themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accuracy.suites.load import Step
from accuracy.suites.serving import Model
from accuracy.suites.verdict import Row, gate_passed


@dataclass(frozen=True)
class Compared:
    """One checkpoint beside BF16.

    Attributes:
        model: The checkpoint.
        hash: Of its content.
        rows: By task, the mean last.
    """

    model: Model
    hash: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether the gate passed."""
        return gate_passed(self.rows)


@dataclass(frozen=True)
class Noise:
    """How far a server's answers differ from its own at temperature 0.

    Attributes:
        task: The task.
        items: Items answered twice.
        different: Answers whose text differs.
        scored_differently: Answers whose score differs.
    """

    task: str
    items: int
    different: int
    scored_differently: int


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy on a video task at an EVS rate, in percent.

    Attributes:
        task: The task.
        directory: The checkpoint.
        rate: The EVS rate.
        accuracy: Of the items that were answered.
        items: How many were.
        published: The published figures at this rate, by precision; empty for the user's own data.
    """

    task: str
    directory: Path
    rate: float
    accuracy: float
    items: int
    published: Mapping[str, float]


@dataclass(frozen=True)
class Asked:
    """How fast a server answered a task.

    Attributes:
        task: The task.
        directory: The checkpoint.
        rate: The EVS rate; None for a task without clips.
        items: Items that this run has asked.
        failed: Requests of them that failed.
        seconds: From the first request to the last answer.
        prompt_tokens: Of all prompts.
        completion_tokens: Of all answers.
        at_once: Requests at a time at the end.
        steps: What was measured at each number of requests at a time.
    """

    task: str
    directory: Path
    rate: float | None
    items: int
    failed: int
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    at_once: int
    steps: tuple[Step, ...]
