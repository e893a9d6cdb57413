"""What a line of the training log says: losses, accuracy of new items, speed."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

from tiny.training.data import Batch


class Seen:
    """Counts what went by since the last log line; accuracy is that of batches seen for the first
    time.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.steps, self.tokens = 0, 0
        self.answered: list[tuple[list[str], float, torch.Tensor]] = []
        self.figures: list[torch.Tensor] = []

    def add(
        self, batch: Batch, rate: float, figures: torch.Tensor, right: torch.Tensor, new: bool
    ) -> None:
        """Count one batch; figures stay on the GPU until the line is written."""
        self.steps += 1
        self.tokens += batch.tokens.numel()
        if new:
            self.answered.append((batch.kinds, rate, right))
            self.figures.append(figures)

    def line(self) -> dict[str, Any]:
        """The log line's figures; the steps must be done."""
        by_kind: dict[str, list[bool]] = defaultdict(list)
        for kinds, rate, right in self.answered:
            for kind, exact in zip(kinds, right.tolist(), strict=False):
                by_kind[kind if rate == 0 else f"{kind}@{rate}"].append(exact)
        elapsed = time.monotonic() - self.started
        every = torch.stack([figures.float() for figures in self.figures]).cpu()
        visual = every[every[:, 2] > 0]
        line: dict[str, Any] = {
            "loss": round(float(every[:, 0].mean()), 4),
            "text": round(float(every[:, 1].mean()), 4),
        }
        line |= {name: round(float(visual[:, place].mean()), 4) if len(visual) else None
                 for place, name in enumerate(("dense", "glyphs", "names"), 2)}  # fmt: skip
        line |= {"steps_s": round(self.steps / elapsed, 1), "tokens_s": round(self.tokens / elapsed),
                 "new": round(len(self.figures) / self.steps, 2)}  # fmt: skip
        line["accuracy"] = {name: round(sum(v) / len(v), 3) for name, v in sorted(by_kind.items())}
        return line
