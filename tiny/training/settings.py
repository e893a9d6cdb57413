"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """A run, as the command line of `tiny.training.train` gives it.

    Attributes:
        out: Directory of the run.
        seed: Of the weights, the items and the pruning rates.
        steps: Updates at most.
        minutes: Minutes of training at most, without pauses.
        pause_after: Minutes after the start to save the state and stop at.
        tokens: Tokens per batch, approximately.
        workers: Processes that draw items; 0 draws them in a thread of this one.
        device: `cuda` or `cpu`.
        compiled: Whether element-wise operations are compiled.
        start: The first stage's checkpoint, for a second stage.
    """

    out: Path
    seed: int
    steps: int
    minutes: float
    pause_after: float
    tokens: int
    workers: int
    device: str
    compiled: bool
    start: Path | None = None
