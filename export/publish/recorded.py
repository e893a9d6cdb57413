"""What a manifest records, read tolerantly: hybridquant.json of an older version, or one that
somebody has edited, has other things in it; what is not there or not sound is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from checkpoint.faults import shortened
from checkpoint.video import Video

_MEAN = "mean"
"""The row that accuracy/paired.py puts last."""

_ALL = "all"
"""The row of all samples in the gate's agreement."""


@dataclass(frozen=True)
class Task:
    """Accuracy of one task under BF16 and under the export, as shares of right answers.

    Attributes:
        name: The task's; `mean` for the mean over tasks.
        items: Items asked of both.
        reference: BF16's accuracy.
        variant: The export's accuracy.
        low: Lower end of the 95 % interval of the difference; None when it is not recorded.
        high: Its upper end.
        dataset: Name of the benchmark's dataset on the Hub; empty for a task that has none.
    """

    name: str
    items: int
    reference: float
    variant: float
    low: float | None = None
    high: float | None = None
    dataset: str = ""

    @property
    def difference(self) -> float:
        """variant − reference."""
        return self.variant - self.reference


@dataclass(frozen=True)
class Agreement:
    """Next-token agreement with BF16 on one kind of held-out sample.

    Attributes:
        group: The kind of sample; `all` for all of them.
        prompts: Prompts compared.
        tokens: Positions compared.
        kl: Mean KL divergence from BF16, in nats.
        top1: Share of positions where both rank the same token first.
        perplexity_ratio: The export's perplexity over BF16's.
    """

    group: str
    prompts: int
    tokens: int
    kl: float
    top1: float
    perplexity_ratio: float


def recorded_hashes(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each file that a manifest records, by relative path."""
    found = {}
    for name, value in mapping(manifest, "files").items():
        digest = value.get("sha256") if isinstance(value, dict) else value
        if isinstance(digest, str):
            found[name] = digest
    return found


def task_rows(rows: object) -> tuple[Task, ...]:
    """Return the sound rows of a list as `accuracy.paired` records them, without the others."""
    found = []
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, dict):
            continue
        reference = number(row.get("reference"))
        variant = number(row.get("variant"))
        items = number(row.get("items"))
        if reference is None or variant is None or items is None:
            continue
        found.append(
            Task(
                name=text(row.get("task")),
                items=int(items),
                reference=reference,
                variant=variant,
                low=number(row.get("low")),
                high=number(row.get("high")),
                dataset=text(row.get("dataset")),
            )
        )
    return tuple(found)


def mean_task(tasks: Iterable[Task]) -> Task | None:
    """Return the row of the mean over tasks; None if there is none."""
    return next((task for task in tasks if task.name == _MEAN), None)


def overall_agreement(rows: Iterable[Agreement]) -> Agreement | None:
    """Return the row of all samples; None if there is none."""
    return next((row for row in rows if row.group == _ALL), None)


def agreement_rows(gate: Mapping[str, Any]) -> tuple[Agreement, ...]:
    """Return the gate's sound rows of agreement, all samples first."""
    rows = []
    for group, figures in mapping(gate, "agreement").items():
        if not isinstance(figures, dict):
            continue
        kl = number(figures.get("kl"))
        top1 = number(figures.get("top1"))
        ratio = number(figures.get("perplexity_ratio"))
        prompts = number(figures.get("prompts"))
        tokens = number(figures.get("tokens"))
        if kl is None or top1 is None or ratio is None or prompts is None or tokens is None:
            continue
        rows.append(Agreement(text(group), int(prompts), int(tokens), kl, top1, ratio))
    return tuple(sorted(rows, key=lambda row: row.group != _ALL))


def calibration_counts(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Return the counts of the calibration, by name."""
    counts = numbers(mapping(manifest, "calibration"))
    return {name: int(count) for name, count in counts.items()}


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of an object, by name."""
    found = {}
    for name, value in values.items():
        finite = number(value)
        if finite is not None:
            found[text(name)] = finite
    return found


def source_lines(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one line for each source of calibration samples: its type, its name or file."""
    sources = mapping(recipe, "calibrate").get("sources")
    lines = []
    for source in sources if isinstance(sources, list) else []:
        if isinstance(source, dict):
            path = without_folders(text(source.get("path")))
            words = [source.get("type"), source.get("name"), path, source.get("split")]
            lines.append(" ".join(text(word) for word in words if word))
    return tuple(line for line in lines if line)


def without_folders(path: str) -> str:
    """Return the last part of a path: what is published must not tell how a disk is laid out."""
    return path.rstrip("/").rpartition("/")[2]


def recorded_video(manifest: Mapping[str, Any]) -> Video:
    """Return how clips were seen; the defaults where that is not recorded."""
    try:
        return Video.model_validate(mapping(manifest, "video"))
    except ValidationError:
        return Video()


def mapping(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an object of a JSON object; empty if there is none."""
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


def text(value: object) -> str:
    """Return a text or number as it may be shown; empty for anything else."""
    return shortened(value) if isinstance(value, str | int | float) else ""


def texts(value: object) -> tuple[str, ...]:
    """Return a list of texts as they may be shown; empty for anything else."""
    if not isinstance(value, list):
        return ()
    return tuple(text(item) for item in value)


def strings(values: Mapping[str, Any]) -> dict[str, str]:
    """Return an object of texts as they may be shown."""
    return {text(name): text(value) for name, value in values.items()}


def number(value: object) -> float | None:
    """Return a value as a finite number; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
