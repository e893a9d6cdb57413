"""Known faults of vLLM with this model: the versions they are in, and where they are reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from serve.environment import Device
from serve.precision import Version


@dataclass(frozen=True)
class Situation:
    """What decides whether a fault can occur.

    Attributes:
        vllm: vLLM's version.
        device: What it runs on.
        ranks: GPUs that the model is split over.
        is_quantized: Whether the checkpoint is.
        has_fast_video: Whether the plug-in prepares clips.
        is_tuned: Whether vLLM finds a configuration of its Mamba state update.
        flags: Canonical names of the vLLM flags that the user gives.
    """

    vllm: Version
    device: Device
    ranks: int
    is_quantized: bool
    has_fast_video: bool
    is_tuned: bool
    flags: frozenset[str]


@dataclass(frozen=True)
class KnownFault:
    """One fault.

    Attributes:
        symptom: What a user sees.
        remedy: What to do, or what has been done.
        source: Where it is reported or was measured.
        since: First version of vLLM that has it.
        fixed: First version without it; None when there is none.
        occurs: Whether it can occur in a situation of those versions.
    """

    symptom: str
    remedy: str
    source: str
    occurs: Callable[[Situation], bool]
    since: Version = (0, 0, 0)
    fixed: Version | None = None

    def applies(self, situation: Situation) -> bool:
        """Return whether it can occur."""
        if situation.vllm < self.since:
            return False
        if self.fixed is not None and situation.vllm >= self.fixed:
            return False
        return self.occurs(situation)


KNOWN_FAULTS = (
    KnownFault(
        symptom="prefix caching of Mamba states has given wrong answers, and ends the engine on a "
        "CPU",
        remedy="leave --enable-prefix-caching out",
        source="vLLM issues 45699 and 53912",
        occurs=lambda situation: "--enable-prefix-caching" in situation.flags,
    ),
    KnownFault(
        symptom="answers drift into nonsense when the Mamba state is kept in 16 bits",
        remedy="it is kept in float32 by --mamba-ssm-cache-dtype",
        source="vLLM pull request 39032",
        occurs=lambda situation: True,
        fixed=(0, 20, 0),
    ),
    KnownFault(
        symptom="scales of the Mamba projection are split otherwise than its weights",
        remedy="compare a few answers with those of one GPU",
        source="vLLM issue 34476",
        occurs=lambda situation: situation.ranks > 1 and situation.is_quantized,
    ),
    KnownFault(
        symptom="one thread resizes all frames in float32: 3 to 4 s for a clip of 720p",
        remedy="install the plug-in",
        source="vLLM pull request 57924; docs/video.md",
        occurs=lambda situation: not situation.has_fast_video,
        since=(0, 26, 0),
    ),
    KnownFault(
        symptom="a video of one frame ends in an IndexError, and interlaced, AV1 and MPEG-TS clips "
        "are read wrongly",
        remedy="install the plug-in",
        source="docs/trouble.md, measured with 0.32",
        occurs=lambda situation: not situation.has_fast_video,
        since=(0, 26, 0),
    ),
    KnownFault(
        symptom="a clip whose sampled frames have more than 0.72 GB, such as 128 of 1080p, is "
        "refused with 400",
        remedy="install the plug-in, or set VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES",
        source="docs/results.md, measured with 0.33",
        occurs=lambda situation: not situation.has_fast_video,
        since=(0, 33, 0),
    ),
    KnownFault(
        symptom="the Mamba state update has no tuned configuration for this model",
        remedy="answers are right, and decoding slower than it could be: run hybridquant tune",
        source="vLLM issue 44251",
        occurs=lambda situation: situation.device.kind == "cuda" and not situation.is_tuned,
    ),
)
"""Faults that a user of `hybridquant serve` can still meet, or whose guard a flag could undo."""


def faults_of(situation: Situation) -> list[KnownFault]:
    """Return the faults that can occur."""
    return [fault for fault in KNOWN_FAULTS if fault.applies(situation)]
