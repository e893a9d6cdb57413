"""Decodes a clip and samples its frames as the server does: 2 fps, at most 128 frames, uniform
beyond 64 seconds.

The indices equal vLLM 0.32's for `--media-io-kwargs '{"video": {"fps": 2, "num_frames": 128}}'`
with its default loader and decoder (`VLLM_VIDEO_LOADER_BACKEND=opencv`). Both keys are needed: with
`num_frames` left out the loader takes 32 frames, with `fps` left out it takes 128 of any clip.
(vllm/multimodal/video.py, VideoBackend; video_decoders/opencv.py.)
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream
from numpy.typing import NDArray

from calibrate.tiles import MAX_PIXELS
from checkpoint.faults import BadInput, Fault

SAMPLE_FPS = 2.0
MAX_FRAMES = 128
# A playlist may name other files and addresses; the file given is the only one read.
_OPTIONS = {"protocol_whitelist": "none"}


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
        """Whole milliseconds a frame of the file lasts: the clock that the prompt's timestamps
        count in.
        """
        return int(1000 / self.fps)


def sample_indices(
    total: int, fps: float, sample_fps: float = SAMPLE_FPS, limit: int = MAX_FRAMES
) -> list[int]:
    """Return the indices of the frames to take, first and last included when there are several.

    Args:
        total: Frames in the file, > 0.
        fps: Frame rate of the file; 0 when unknown, which leaves one frame, as in vLLM.
        sample_fps: Frames to take a second.
        limit: Most frames to take.
    """
    duration = total / fps if fps > 0 else 0.0
    count = max(1, min(limit, total, math.floor(duration * sample_fps)))
    if count == total:
        return list(range(total))
    return np.linspace(0, total - 1, count, dtype=int).tolist()


def decode(data: bytes, where: str) -> Clip:
    """Decode a video file and sample it.

    Frames that cannot be decoded are left out; the others keep their indices.

    Args:
        data: The file: anything FFmpeg reads, MP4, WebM and GIF among them.
        where: Names the sample in faults.

    Raises:
        BadInput: It is no video, its frame rate is unknown, its frames are too large or none can be
            decoded.
    """
    try:
        with av.open(io.BytesIO(data), "r", options=_OPTIONS) as container:
            if not container.streams.video:
                raise BadInput(Fault(where, "file has no video stream", "give MP4, WebM or GIF"))
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                what = f"frames have {stream.width}x{stream.height} pixels, at most {MAX_PIXELS} are served"
                raise BadInput(Fault(where, what, "make them smaller"))
            fps = _frame_rate(stream)
            total = _frame_count(container, stream, fps)
        if fps <= 0 or total <= 0:
            what = f"video has {total} frames at {fps:g} per second"
            raise BadInput(Fault(where, what, "write it again with a constant frame rate"))
        wanted = sample_indices(total, fps)
        # Opened a second time: not every container can seek back to its beginning after the count.
        with av.open(io.BytesIO(data), "r", options=_OPTIONS) as container:
            taken = _read(container, set(wanted))
    except av.FFmpegError as error:
        raise BadInput(
            Fault(where, f"video cannot be read: {error}", "give MP4, WebM or GIF")
        ) from None
    if not taken:
        raise BadInput(Fault(where, "no frame of the video can be decoded", "write the file again"))
    if len({frame.shape for frame in taken.values()}) > 1:
        raise BadInput(
            Fault(where, "frame size changes within the video", "write the file again in one size")
        )
    indices = tuple(sorted(taken))
    return Clip(np.stack([taken[index] for index in indices]), indices, fps)


def _frame_rate(stream: VideoStream) -> float:
    """Frames a second as OpenCV reports them: on average, else FFmpeg's guess (a short MPEG-TS has
    no average).
    """
    return float(stream.average_rate or stream.guessed_rate or 0)


def _frame_count(container: InputContainer, stream: VideoStream, fps: float) -> int:
    """Frames that can be shown: the header's count, or the duration's where there is none, less
    what is cut away.
    """
    duration = container.duration / av.time_base if container.duration else 0.0
    if not duration and stream.duration and stream.time_base:
        duration = float(stream.duration * stream.time_base)
    total = stream.frames or math.floor(duration * fps + 0.5)
    # A clip cut without re-encoding keeps the frames before the cut in the file and hides them with
    # an edit list; the header counts them all the same. vLLM corrects the count from two frames'
    # difference on.
    shown = sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
    return shown if 0 < shown < total - 1 else total


def _read(container: InputContainer, wanted: set[int]) -> dict[int, NDArray[np.uint8]]:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    taken: dict[int, NDArray[np.uint8]] = {}
    last = max(wanted)
    index = 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            continue  # a damaged packet loses its own frame, not the clip
        for frame in frames:
            if index in wanted:
                taken[index] = _rgb(frame)
            index += 1
        if index > last:
            break
    return taken


def _rgb(frame: VideoFrame) -> NDArray[np.uint8]:
    # Phones write portrait clips as landscape frames and a rotation; OpenCV applies it, so we do.
    # Bicubic chroma, the scaler OpenCV asks for: FFmpeg's default differs by up to several grey
    # levels at coloured edges.
    pixels = frame.to_ndarray(format="rgb24", interpolation=Interpolation.BICUBIC)
    return np.ascontiguousarray(np.rot90(pixels, k=round(frame.rotation / 90) % 4))
