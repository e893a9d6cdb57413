"""Mixes several sources of samples by weight, and shuffles them, by a seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from calibrate.samples import Sample
from checkpoint.faults import BadInput, Fault


def mixed(
    sources: Sequence[tuple[Iterable[Sample], float]],
    samples: int | None = None,
    seed: int = 0,
    name: str = "sources",
) -> Iterator[Sample]:
    """Interleave sources in proportion to their weights, the same way for the same `seed`.

    After any n samples each source has given its share of n to within one. A source that ends is
    not repeated, since a second look at a sample changes no range: the others continue in their
    proportions, and the mix ends with the last of them, or after `samples`.

    Args:
        sources: Iterables of samples, each with its weight > 0.
        samples: How many to yield at most; None for all.
        seed: Decides which source begins.
        name: What faults call the sources: their key in a recipe.

    Raises:
        BadInput: There is no source, a weight is not positive, or the sources together contain no
            sample.
    """
    weights = [weight for _, weight in sources]
    if not sources or not all(weight > 0 for weight in weights):
        raise BadInput(Fault(name, f"weights are {weights}", "give at least one, all above 0"))
    generator = random.Random(seed)
    credit = {index: generator.random() * weight for index, weight in enumerate(weights)}
    remaining = {index: iter(source) for index, (source, _) in enumerate(sources)}
    count = 0
    while remaining and (samples is None or count < samples):
        total_weight = sum(weights[index] for index in remaining)
        for index in remaining:
            credit[index] += weights[index]
        chosen = max(remaining, key=lambda index: (credit[index], -index))
        try:
            sample = next(remaining[chosen])
        except StopIteration:
            del remaining[chosen]
            continue
        credit[chosen] -= total_weight
        count += 1
        yield sample
    if count == 0 and samples != 0:
        raise BadInput(Fault(name, "contain no samples", "give at least one that does"))


def shuffled(samples: Iterable[Sample], seed: int, buffer: int = 256) -> Iterator[Sample]:
    """Yield `samples` in an order drawn from `seed`.

    Args:
        samples: Read as far as needed: only `buffer` of them are held at once.
        seed: Of the order.
        buffer: Samples among which the next one is drawn.
    """
    generator = random.Random(seed)
    held: list[Sample] = []
    for sample in samples:
        held.append(sample)
        if len(held) > buffer:
            yield held.pop(generator.randrange(len(held)))
    generator.shuffle(held)
    yield from held
