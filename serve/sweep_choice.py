"""Chooses an EVS rate: the highest whose loss of accuracy is inside a tolerance, and says why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

RULE_OF_THREE = 3.0
"""If none of n items got worse, up to 3/n of all items may all the same, with 95 % confidence
(Hanley and Lippman-Hand 1983)."""


@dataclass(frozen=True)
class Loss:
    """What a rate loses against rate 0 on the same items, in points of accuracy.

    Attributes:
        rate: The EVS rate.
        items: Items asked at both rates.
        points: Accuracy at rate 0 less accuracy at this rate.
        low: Lower end of its 95 % interval.
        high: Upper end.
    """

    rate: float
    items: int
    points: float
    low: float
    high: float

    @property
    def most(self) -> float:
        """The largest loss that the items do not exclude.

        A bootstrap over few items that all agree has an interval of no width; the rule of three
        says what so few items may have missed.
        """
        return max(self.high, 100 * RULE_OF_THREE / self.items)


@dataclass(frozen=True)
class Choice:
    """A recommendation.

    Attributes:
        rate: The highest rate that is inside the tolerance; 0 if no other is.
        sentences: The reason, then what is known about each higher rate.
    """

    rate: float
    sentences: tuple[str, ...]


def choose(losses: Sequence[Loss], tolerance: float) -> Choice:
    """Choose the highest rate whose loss is certainly inside the tolerance.

    Args:
        losses: Of all rates above 0.
        tolerance: The largest loss that is accepted, in points of accuracy.
    """
    ordered = sorted(losses, key=lambda loss: loss.rate)
    inside = [loss for loss in ordered if loss.most <= tolerance]
    chosen = inside[-1] if inside else None
    rate = chosen.rate if chosen else 0.0
    sentences = list(_reason(chosen, tolerance))
    for loss in ordered:
        if loss.rate > rate:
            sentences.append(_rejection(loss, tolerance))
    return Choice(rate, tuple(sentences))


def _reason(chosen: Loss | None, tolerance: float) -> Iterator[str]:
    if chosen is None:
        yield f"rate 0 (EVS off): no rate is certainly inside the tolerance of {tolerance:g} points"
        return
    found = f"{_described(chosen)}, so at most {chosen.most:.1f}"
    yield f"rate {chosen.rate:g}: {found}: inside the tolerance of {tolerance:g} points"


def _rejection(loss: Loss, tolerance: float) -> str:
    described = f"rate {loss.rate:g}: {_described(loss)}"
    if loss.low > tolerance:
        return f"{described}: outside the tolerance"
    return f"{described}: {loss.items} items are too few to tell{_needed(loss, tolerance)}"


def _described(loss: Loss) -> str:
    interval = f"95 % interval {loss.low:+.1f} … {loss.high:+.1f}"
    return f"loses {loss.points:.1f} points ({interval}, {loss.items} items)"


def _needed(loss: Loss, tolerance: float) -> str:
    """How many items would tell if the loss stayed; an interval narrows with their square root."""
    if loss.points >= tolerance:
        return ""
    half_width = loss.high - loss.points
    room = tolerance - loss.points
    items = max(
        loss.items * (half_width / room) ** 2,
        100 * RULE_OF_THREE / tolerance,
    )
    return f"; about {10 * math.ceil(items / 10)} would if the loss stays"
