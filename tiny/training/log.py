"""Collects the figures of a line of the training log: losses, accuracy of new items, speed."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

from tiny.training.data import Batch


class Seen:
    """Collects the results of the steps since the last log line.

    Losses and accuracy are those of batches that the model sees for the first time.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.steps = 0
        self.tokens = 0
        self.answered: list[tuple[list[str], float, torch.Tensor]] = []
        self.figures: list[torch.Tensor] = []

    def add(
        self, batch: Batch, rate: float, figures: torch.Tensor, right: torch.Tensor, new: bool
    ) -> None:
        """Add the results of one step. They stay on the device, so nothing waits for it.

        Args:
            batch: The batch.
            rate: Pruning rate of its clips.
            figures: float32 [5]: as `tiny.training.train.Trainer.losses` returns them.
            right: bool [questions]: which questions are answered exactly.
            new: Whether the model sees the batch for the first time.
        """
        self.steps += 1
        self.tokens += batch.tokens.numel()
        if new:
            self.answered.append((batch.kinds, rate, right))
            self.figures.append(figures.detach())

    def line(self) -> dict[str, Any]:
        """Return the figures of the log line; all steps must be finished."""
        elapsed = time.monotonic() - self.started
        figures = torch.stack([each.float() for each in self.figures]).cpu()
        has_pictures = figures[:, 2] > 0
        visual = figures[has_pictures]
        line: dict[str, Any] = {
            "loss": _mean(figures[:, 0]),
            "text": _mean(figures[:, 1]),
            "dense": _mean(visual[:, 2]),
            "glyphs": _mean(visual[:, 3]),
            "names": _mean(visual[:, 4]),
            "steps_s": round(self.steps / elapsed, 1),
            "tokens_s": round(self.tokens / elapsed),
            "new": round(len(self.figures) / self.steps, 2),
            "accuracy": self._accuracy(),
        }
        return line

    def _accuracy(self) -> dict[str, float]:
        """Return the share of right answers by kind, clips also by pruning rate."""
        by_kind: dict[str, list[bool]] = defaultdict(list)
        for kinds, rate, right in self.answered:
            # `right` has room for more questions than the batch has.
            for kind, exact in zip(kinds, right.tolist(), strict=False):
                name = kind if rate == 0 else f"{kind}@{rate}"
                by_kind[name].append(exact)
        accuracy = {}
        for name, exact in sorted(by_kind.items()):
            accuracy[name] = round(sum(exact) / len(exact), 3)
        return accuracy


def _mean(values: torch.Tensor) -> float | None:
    """Return the mean of a column, None if it has no values."""
    if len(values) == 0:
        return None
    return round(float(values.mean()), 4)
