"""Statistics of paired scores: intervals of the difference, McNemar's test, how many items tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_TAIL = 0.025
"""Each tail of a 95 % interval."""
_AT_ONCE = 2_000_000
"""Numbers drawn at once: 16 MB."""
FEW = 10
"""Items with different scores below which a bootstrap says too little: with none, its interval is
empty however few items there are."""

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """How a variant's scores differ from the reference's on the same items; shares, not percent.

    Attributes:
        items: Number of items.
        reference: The reference's figure.
        variant: The variant's figure.
        low: Lower end of the 95 % interval of variant − reference.
        high: Upper end.
        worse: Items that the variant scores lower on.
        better: Items that it scores higher on.
        p_value: McNemar's exact test of equal accuracy; None where scores are not yes or no.
    """

    items: int
    reference: float
    variant: float
    low: float
    high: float
    worse: int
    better: int
    p_value: float | None

    @property
    def difference(self) -> float:
        """variant − reference."""
        return self.variant - self.reference


def paired_difference(
    reference: Scores, variant: Scores, groups: Sequence[str] | None = None
) -> tuple[Difference, Scores]:
    """Compare two models' scores of the same items.

    The interval is a paired bootstrap over items (Efron and Tibshirani 1993, chapter 13) with
    10,000 resamples from a fixed seed. Where fewer than ten items differ it is widened to what the
    numbers of changed items allow (Clopper and Pearson 1934): no change in n items is no proof of
    no change.

    Args:
        reference: The reference's scores between 0 and 1.
        variant: The variant's, in the same order.
        groups: What the data set averages over first, by item; None where it averages over items.

    Returns:
        The comparison, and the resampled differences [10,000].

    Raises:
        ValueError: There are no items, or not as many on both sides.
    """
    if len(reference) != len(variant) or not len(reference):
        raise ValueError(f"{len(reference)} and {len(variant)} scores")
    count = len(reference)
    weights = _weights(groups, count)
    change = variant - reference
    resampled = _resampled(change, groups, weights)
    low, high = np.quantile(resampled, (_TAIL, 1 - _TAIL))
    worse = int((change < 0).sum())
    better = int((change > 0).sum())
    if worse + better < FEW:
        low = min(low, -largest_share(worse, count))
        high = max(high, largest_share(better, count))
    is_binary = bool(np.isin(reference, (0, 1)).all() and np.isin(variant, (0, 1)).all())
    found = Difference(
        items=count,
        reference=float((weights * reference).sum()),
        variant=float((weights * variant).sum()),
        low=float(low),
        high=float(high),
        worse=worse,
        better=better,
        p_value=mcnemar(worse, better) if is_binary else None,
    )
    return found, resampled


def _weights(groups: Sequence[str] | None, count: int) -> Scores:
    """Each item's weight in the figure: equal, or equal for each group."""
    if groups is None:
        return np.full(count, 1 / count)
    names, members = np.unique(np.array(groups), return_inverse=True)
    sizes = np.bincount(members)
    return np.asarray(1 / (len(names) * sizes[members]), dtype=float)


def _resampled(change: Scores, groups: Sequence[str] | None, weights: Scores) -> Scores:
    """Differences of the figure in resamples [10,000]; of groups each keeps its size."""
    random = np.random.default_rng(0)
    if groups is None:
        strata = [np.arange(len(change))]
    else:
        named = np.array(groups)
        strata = [np.flatnonzero(named == name) for name in np.unique(named)]
    total = np.zeros(RESAMPLES)
    for members in strata:
        weighted = (change * weights)[members]
        rows = max(1, _AT_ONCE // len(members))
        for start in range(0, RESAMPLES, rows):
            part = min(rows, RESAMPLES - start)
            picked = random.integers(0, len(members), (part, len(members)))
            total[start : start + part] += weighted[picked].sum(1)
    return total


def mcnemar(worse: int, better: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Args:
        worse: Items right under the reference alone.
        better: Items right under the variant alone.
    """
    changed = worse + better
    if changed == 0:
        return 1.0
    tail = sum(math.comb(changed, number) for number in range(min(worse, better) + 1))
    return min(1.0, 2 * tail / 2**changed)


def largest_share(count: int, items: int) -> float:
    """Return the upper end of the 95 % interval of Clopper and Pearson for `count` of `items`."""
    if count >= items:
        return 1.0
    low, high = count / items, 1.0
    for _ in range(50):
        share = (low + high) / 2
        if _at_most(count, items, share) > _TAIL:
            low = share
        else:
            high = share
    return high


def _at_most(count: int, items: int, share: float) -> float:
    """Probability of at most `count` of `items` at a share."""
    total = 0.0
    for number in range(count + 1):
        ways = math.comb(items, number)
        total += ways * share**number * (1 - share) ** (items - number)
    return total


def items_to_tell(found: Difference, margin: float) -> int | None:
    """Return how many items would put the lower end of the interval above −margin.

    It assumes that the difference and the share of changed items stay as they are, so that the
    interval narrows with the square root of the number of items.

    Args:
        found: A comparison.
        margin: The loss that is allowed, as a share.

    Returns:
        The number; None when the difference itself is not above −margin, and more items of the same
        kind would not help.
    """
    room = found.difference + margin
    if room <= 0:
        return None
    if found.worse + found.better == 0:
        return math.ceil(math.log(_TAIL) / math.log(1 - margin))
    width = found.difference - found.low
    return math.ceil(found.items * (width / room) ** 2)
