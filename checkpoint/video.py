"""How video is seen: the one value that calibration, accuracy, server and client share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.settings import Section

PruningRate = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""EVS rate q: the share of a clip's visual tokens that is dropped; 0 drops none."""


class Video(Section):
    """How clips are sampled and pruned, in calibration, in the accuracy gate and when serving.

    The manifest of an export carries it, and `python -m serve` and `python -m accuracy` read it
    from there.
    """

    pruning_rate: PruningRate = 0.75
    """EVS rate q in [0, 1): the share of a clip's visual tokens that is dropped. 0 turns EVS off.
    """
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """Frames sampled per second of a clip, as in the technical report (arXiv 2511.03929)."""
    max_frames: Annotated[int, Field(ge=1)] = 128
    """Most frames sampled of a clip; a longer clip is sampled uniformly."""

    def with_rate(self, pruning_rate: float) -> Video:
        """Return the same sampling with another EVS rate."""
        return Video(pruning_rate=pruning_rate, fps=self.fps, max_frames=self.max_frames)

    def __str__(self) -> str:
        return f"EVS rate {self.pruning_rate:g}, {self.fps:g} fps, {self.max_frames} frames"


UNPRUNED = Video(pruning_rate=0.0)
"""The report's sampling without EVS."""


def parse_rates(text: str, option: str) -> list[float]:
    """Parse EVS rates with commas between them, and return each once, ascending.

    Args:
        text: As `0,0.5,0.75`.
        option: Names it in the error.

    Raises:
        BadInput: A part is not a rate.
    """
    rates = set()
    for part in text.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = -1.0
        if not 0 <= rate < 1:
            remedy = "give rates from 0 up to but not including 1, such as 0,0.5,0.75"
            raise BadInput(Fault(option, f"is {shortened(text, 80)!r}", remedy))
        rates.add(rate)
    return sorted(rates)
