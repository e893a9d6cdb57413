"""Several sources of samples as one: mixed by weight, or shuffled through a buffer, the same way
for the same seed.
"""

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

    After any n samples each source has given its share of n to within one. A source that runs out
    is not repeated, as a second look at a sample changes no amax: the others go on in their
    proportions, and the mix ends with the last of them, or after `samples`.

    Args:
        sources: Iterables of samples, each with its weight > 0.
        samples: How many to yield at most; None for all.
        seed: Decides which source begins.
        name: What faults call the sources: their key in a recipe.

    Raises:
        BadInput: There is no source, a weight is not positive, or the sources together hold no
            sample.
    """
    if not sources or any(not weight > 0 for _, weight in sources):
        weights = [weight for _, weight in sources]
        raise BadInput(Fault(name, f"weights are {weights}", "give at least one, all above 0"))
    draw = random.Random(seed)
    credit = {index: draw.random() * weight for index, (_, weight) in enumerate(sources)}
    open_sources = {index: iter(source) for index, (source, _) in enumerate(sources)}
    total = 0
    while open_sources and (samples is None or total < samples):
        whole = sum(sources[index][1] for index in open_sources)
        for index in open_sources:
            credit[index] += sources[index][1]
        turn = max(open_sources, key=lambda index: (credit[index], -index))
        try:
            sample = next(open_sources[turn])
        except StopIteration:
            del open_sources[turn]
            continue
        credit[turn] -= whole
        total += 1
        yield sample
    if not total and samples != 0:
        raise BadInput(Fault(name, "hold no samples", "give at least one that does"))


def shuffled(samples: Iterable[Sample], seed: int, buffer: int = 256) -> Iterator[Sample]:
    """Yield `samples` in an order drawn from `seed`, through a buffer, so that a stream need not be
    read to its end.
    """
    draw, held = random.Random(seed), list[Sample]()
    for sample in samples:
        held.append(sample)
        if len(held) > buffer:
            yield held.pop(draw.randrange(len(held)))
    draw.shuffle(held)
    yield from held
