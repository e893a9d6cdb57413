"""The recipe's section `accuracy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from accuracy.suites.catalogue import REPORT
from calibrate.settings import DEFAULT_SOURCES, Sources
from checkpoint.faults import nearest, shortened
from checkpoint.settings import Section
from tiny.tasks import TASKS


class Tasks(Section):
    """Exact tasks that BF16 and the result both answer."""

    names: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(TASKS)
    """Which tasks of tiny/tasks.py."""
    items: Annotated[int, Field(ge=1)] = 100
    """Items per task."""
    max_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Points that the mean over the tasks may lose against BF16."""

    @field_validator("names")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in TASKS:
                raise ValueError(f"unknown task {shortened(name, 80)!r}: {nearest(name, TASKS)}")
        return names


class Suites(Section):
    """Published benchmarks that BF16 and the result are served for, when their data is there."""

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    """Which tasks of the suite `report`, as for `python -m accuracy --suite report --tasks`."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Items per task; without it, all."""
    max_loss: Annotated[float, Field(gt=0, lt=100, allow_inf_nan=False)] = 1.5
    """Points that no task may lose against BF16, with 95 % certainty."""
    data: Path | None = None
    """VLMEvalKit's folder of tables; without it, `$LMUData` or `~/LMUData`."""
    own_data: bool = False
    """Take tables with other checksums than the published."""

    @field_validator("names")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        known = {task.name for task in REPORT}
        for name in names:
            if name not in known:
                raise ValueError(f"unknown task {shortened(name, 80)!r}: {nearest(name, known)}")
        return names


class Accuracy(Section):
    """What is measured against BF16 before a checkpoint counts as done, and what is required."""

    sources: Sources = DEFAULT_SOURCES
    """Where the held-out prompts come from."""
    samples: Annotated[int, Field(ge=1)] = 64
    """Held-out prompts to compare on."""
    seed: int = 1_000_003
    """Another seed than calibration's, so that the samples are held out."""
    max_skipped: Annotated[int, Field(ge=0)] = 0
    """Bad samples to skip and count before the run stops."""
    max_kl: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Largest mean KL divergence from BF16's next-token distributions, in nats."""
    min_top1: Annotated[float, Field(ge=0, le=1)] | None = None
    """Smallest share of positions where both models rank the same token first."""
    max_perplexity_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Largest perplexity over BF16's."""
    tasks: Tasks | None = None
    """Tasks with exact answers, which the tiny checkpoint was trained for; null for none."""
    suites: Suites | None = None
    """Published benchmarks at the end, on vLLM; null for none."""
