"""Registers the kinds of synthetic scenes, and encodes scenes as chat messages with an answer.

The same kind, seed and index give the same bytes on every machine. The samples are a calibration
source that needs neither network nor licence, and the items of `tiny.tasks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from calibrate.samples import Sample
from calibrate.sources.synthetic.clips import FPS, video_event, video_static
from calibrate.sources.synthetic.drawing import data_url, mp4_bytes, png_bytes, random_state
from calibrate.sources.synthetic.lists import order, text
from calibrate.sources.synthetic.scenes import Scene, SceneMaker, chart, document, images, table
from checkpoint.faults import BadInput, Fault, nearest, raise_if_any

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
"""The kinds of the default mixture. `order` is not one of them, because `text` contains it."""


def compose(kind: str, seed: int | str, index: int) -> Scene:
    """Return one scene before encoding.

    Args:
        kind: One of `KINDS`.
        seed: Names the series; a string for derived ones.
        index: Position in the series; any scene can be drawn without those before it.

    Raises:
        BadInput: The kind is unknown; the message names the nearest one.
    """
    if kind not in KINDS:
        raise BadInput(_unknown_kind(kind))
    return KINDS[kind](random_state(kind, seed, index))


def _unknown_kind(kind: str) -> Fault:
    return Fault("synthetic kind", f"unknown kind {kind!r}", nearest(kind, KINDS))


def draw(kind: str, seed: int | str, index: int) -> Sample:
    """Return one sample: messages with PNG or MP4 data URLs, and the answer.

    Args:
        kind: One of `KINDS`.
        seed: Names the series; a string for derived ones.
        index: Position in the series; any sample can be drawn without those before it.

    Raises:
        BadInput: The kind is unknown; the message names the nearest one.
    """
    scene = compose(kind, seed, index)
    return Sample(f"{kind}-{seed}-{index}", messages(scene), f"synthetic {kind}", scene.answer)


def messages(scene: Scene) -> list[dict[str, Any]]:
    """Return the chat messages of a scene.

    They are `/no_think` from the system, and from the user the clip or the pictures, numbered if
    there are several, and the question.
    """
    parts: list[dict[str, Any]] = []
    if scene.moving:
        frames = np.stack([picture.pixels for picture in scene.pictures])
        url = data_url("video/mp4", mp4_bytes(frames, FPS))
        parts.append({"type": "video_url", "video_url": {"url": url}})
    else:
        for number, picture in enumerate(scene.pictures, 1):
            if len(scene.pictures) > 1:
                parts.append({"type": "text", "text": f"Image {number}: "})
            url = data_url("image/png", png_bytes(picture.pixels))
            parts.append({"type": "image_url", "image_url": {"url": url}})
    question = f"\n{scene.question}" if parts else scene.question
    parts.append({"type": "text", "text": question})
    return [{"role": "system", "content": "/no_think"}, {"role": "user", "content": parts}]


def synthetic(
    weights: Mapping[str, float] | Sequence[str], samples: int, seed: int
) -> Iterator[Sample]:
    """Return an iterator over samples of several kinds.

    Args:
        weights: Share of each kind; a list of kinds gives each the same.
        samples: Number of samples.
        seed: Names the series. Sample k depends on `seed` and k alone, so a shorter run is a prefix
            of a longer one.

    Raises:
        BadInput: Before the first sample, with every unknown kind and every weight that is not
            above 0.
    """
    shares = dict(weights) if isinstance(weights, Mapping) else dict.fromkeys(weights, 1.0)
    faults = [_unknown_kind(kind) for kind in shares if kind not in KINDS]
    for kind, weight in shares.items():
        if not weight > 0:
            what = f"{kind} has weight {weight}"
            faults.append(Fault("synthetic kind", what, "give a number above 0"))
    if not shares:
        choices = ", ".join(sorted(KINDS))
        faults.append(Fault("synthetic kind", "no kind is given", f"choose from {choices}"))
    raise_if_any(faults)
    return _samples(shares, samples, seed)


def _samples(shares: Mapping[str, float], samples: int, seed: int) -> Iterator[Sample]:
    kinds = sorted(shares)
    share = np.array([shares[kind] for kind in kinds])
    for index in range(samples):
        number = random_state("kind", seed, index).choice(len(kinds), p=share / share.sum())
        # The series of the calibration split of `tiny.tasks`: no sample is a training or test item.
        yield draw(kinds[number], f"calibration-{seed}", index)
