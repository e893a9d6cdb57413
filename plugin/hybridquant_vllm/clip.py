"""A clip: its sampled frames, what is known of its file, and why it cannot be used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray


class ClipError(ValueError):
    """A clip that cannot be used, in one sentence.

    Attributes:
        what: What is wrong with it.
        remedy: What to do.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what} ({remedy})")
        self.what = what
        self.remedy = remedy


@dataclass(frozen=True)
class Clip:
    """The sampled frames of a video.

    Attributes:
        frames: uint8 [frames, height, width, 3], RGB, upright.
        indices: Place of each frame in the file, counted from 0.
        fps: Frame rate of the file.
        total: Frames in the file.
    """

    frames: NDArray[np.uint8]
    indices: tuple[int, ...]
    fps: float
    total: int

    @property
    def frame_duration_ms(self) -> int:
        """Duration of a frame in whole milliseconds; timestamps are multiples of it."""
        return int(1000 / self.fps)


@dataclass(frozen=True)
class OpenedClip:
    """A clip whose packets are read.

    Attributes:
        container: Open as long as the stream is decoded.
        stream: The stream of the film.
        packets: All its packets in the order of decoding.
        fps: Frame rate, > 0.
        total: Frames that can be shown, > 0.
        is_whole: Whether the file has as many packets as its header says.
    """

    container: InputContainer
    stream: VideoStream
    packets: list[Packet]
    fps: float
    total: int
    is_whole: bool
