"""Decodes a clip and samples its frames as the server does.

With 2 fps and at most 128 frames, a clip of up to 64 seconds gives two frames per second, a longer
one 128 frames, uniformly.

The decoder is the plug-in's, `hybridquant_vllm.frames`, so calibration and a server with the
plug-in see the same pixels. The indices equal those of vLLM without it for
`--media-io-kwargs '{"video": {"fps": 2, "num_frames": 128}}'`. Both keys are needed: with
`num_frames` left out the loader takes 32 frames, with `fps` left out it takes 128 of any clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from checkpoint.faults import BadInput, Fault
from checkpoint.video import Video
from hybridquant_vllm import frames as decoder


@dataclass(frozen=True)
class Clip:
    """The sampled frames of a video.

    Attributes:
        frames: uint8 [frames, height, width, 3], RGB, upright.
        indices: Place of each frame in the file, counted from 0.
        fps: Frame rate of the file.
    """

    frames: NDArray[np.uint8]
    indices: tuple[int, ...]
    fps: float

    @property
    def frame_duration_ms(self) -> int:
        """Duration of a frame in whole milliseconds; timestamps are multiples of it."""
        return int(1000 / self.fps)


def sample_indices(total: int, fps: float, video: Video) -> list[int]:
    """Return the indices of the frames to take, first and last included if there are several.

    Args:
        total: Frames in the file, > 0.
        fps: Frame rate of the file; 0 if unknown, which leaves one frame, as in vLLM.
        video: Frames per second to take, and most frames.
    """
    return decoder.sample_indices(total, fps, video.fps, video.max_frames)


def decode(data: bytes, where: str, video: Video, size: int | None = None) -> Clip:
    """Decode a video file and sample it.

    Frames that cannot be decoded are left out; the others keep their indices.

    Args:
        data: The file: anything that FFmpeg reads, MP4, WebM and GIF among them.
        where: Names the sample in faults.
        video: How it is sampled.
        size: Side of the squares that frames are resized to; None keeps the size of the file.

    Raises:
        BadInput: It is not a video, its frame rate is unknown, it is too long, its frames are too
            large, or none of them can be decoded.
    """
    square = None if size is None else (size, size)
    try:
        clip = decoder.read_clip(data, fps=video.fps, max_frames=video.max_frames, size=square)
    except decoder.ClipError as error:
        raise BadInput(Fault(where, error.what, error.remedy)) from None
    return Clip(clip.frames, clip.indices, clip.fps)
