"""Synthetic samples with answers: pages, tables, charts, pictures, clips and lists, the same bytes
for the same seed.

They are a calibration source that needs no network and no licence, and the items of
`accuracy.tasks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from calibrate.samples import Sample
from calibrate.sources.synthetic.clips import FPS, video_event, video_static
from calibrate.sources.synthetic.drawing import data_url, mp4_bytes, png_bytes, stream
from calibrate.sources.synthetic.lists import order, text
from calibrate.sources.synthetic.scenes import Scene, SceneMaker, chart, document, images, table
from checkpoint.faults import BadInput, Fault, nearest

KINDS: dict[str, SceneMaker] = {
    "document": document,
    "table": table,
    "chart": chart,
    "images": images,
    "video_event": video_event,
    "video_static": video_static,
    "text": text,
    "order": order,
}
MIXED = tuple(kind for kind in KINDS if kind != "order")
"""The kinds that are drawn where none is named: `text` has what `order` has."""


def compose(kind: str, seed: int | str, index: int) -> Scene:
    """The scene number `index` of a kind, before encoding.

    Raises:
        BadInput: For an unknown kind, naming the nearest.
    """
    if kind not in KINDS:
        raise BadInput(Fault("synthetic kind", f"unknown kind {kind!r}", nearest(kind, KINDS)))
    return KINDS[kind](stream(kind, seed, index))


def draw(kind: str, seed: int | str, index: int) -> Sample:
    """The sample number `index` of a kind: messages with PNG or MP4 data URLs, and the answer.

    Args:
        kind: One of `KINDS`.
        seed: Names the series; a string for derived ones.
        index: Place in the series; any sample can be drawn without those before it.

    Raises:
        BadInput: For an unknown kind, naming the nearest.
    """
    scene = compose(kind, seed, index)
    return Sample(f"{kind}-{seed}-{index}", messages(scene), f"synthetic {kind}", scene.answer)


def messages(scene: Scene) -> list[dict[str, Any]]:
    """The chat messages of a scene: `/no_think`, then pictures (numbered when several) or the clip,
    the question.
    """
    parts: list[dict[str, Any]] = []
    if scene.moving:
        url = data_url(
            "video/mp4", mp4_bytes(np.stack([picture.pixels for picture in scene.pictures]), FPS)
        )
        parts.append({"type": "video_url", "video_url": {"url": url}})
    else:
        for number, picture in enumerate(scene.pictures, 1):
            if len(scene.pictures) > 1:
                parts.append({"type": "text", "text": f"Image {number}: "})
            url = data_url("image/png", png_bytes(picture.pixels))
            parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": ("\n" if parts else "") + scene.question})
    return [{"role": "system", "content": "/no_think"}, {"role": "user", "content": parts}]


def synthetic(
    weights: Mapping[str, float] | Sequence[str], samples: int, seed: int
) -> Iterator[Sample]:
    """Yield `samples` samples of several kinds.

    Args:
        weights: Share of each kind; a list of kinds gives each the same.
        samples: How many to yield.
        seed: The series; sample k depends on seed and k alone, so a shorter run is a prefix of a
            longer one.

    Raises:
        BadInput: Before the first sample, with every unknown kind and every weight that is not
            above 0.
    """
    shares = dict(weights) if isinstance(weights, Mapping) else dict.fromkeys(weights, 1.0)
    faults = [Fault("synthetic kind", f"unknown kind {kind!r}", nearest(kind, KINDS)) for kind in shares
              if kind not in KINDS]  # fmt: skip
    faults += [Fault("synthetic kind", f"{kind} has weight {weight}", "give a number above 0")
               for kind, weight in shares.items() if not weight > 0]  # fmt: skip
    if not shares:
        faults.append(
            Fault("synthetic kind", "no kind is given", f"choose from {', '.join(sorted(KINDS))}")
        )
    if faults:
        raise BadInput(*faults)
    return _drawn(shares, samples, seed)


def _drawn(shares: Mapping[str, float], samples: int, seed: int) -> Iterator[Sample]:
    kinds = sorted(shares)
    # The series is the calibration split of `accuracy.tasks`, disjoint from what is trained on and
    # tested with.
    share = np.array([shares[kind] for kind in kinds])
    for index in range(samples):
        kind = kinds[stream("kind", seed, index).choice(len(kinds), p=share / share.sum())]
        yield draw(kind, f"calibration-{seed}", index)
