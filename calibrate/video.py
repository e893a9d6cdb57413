"""Decodes a clip and samples its frames as the server does.

With 2 fps and at most 128 frames, a clip of up to 64 seconds gives two frames per second, a longer
one 128 frames, uniformly.

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
from checkpoint.video import Video

# A playlist may name other files and addresses; the given file is the only one that is read.
_OPTIONS = {"protocol_whitelist": "none"}
_FORMATS = "give MP4, WebM or GIF"


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
    duration = total / fps if fps > 0 else 0.0
    wanted = math.floor(duration * video.fps)
    count = max(1, min(video.max_frames, total, wanted))
    if count == total:
        return list(range(total))
    return np.linspace(0, total - 1, count, dtype=int).tolist()


def decode(data: bytes, where: str, video: Video) -> Clip:
    """Decode a video file and sample it.

    Frames that cannot be decoded are left out; the others keep their indices.

    Args:
        data: The file: anything that FFmpeg reads, MP4, WebM and GIF among them.
        where: Names the sample in faults.
        video: How it is sampled.

    Raises:
        BadInput: It is not a video, its frame rate is unknown, its frames are too large, or none of
            them can be decoded.
    """
    try:
        with av.open(io.BytesIO(data), "r", options=_OPTIONS) as container:
            if not container.streams.video:
                raise BadInput(Fault(where, "file has no video stream", _FORMATS))
            stream = container.streams.video[0]
            _check_frame_size(stream, where)
            fps = _frame_rate(stream)
            total = _frame_count(container, stream, fps)
        if fps <= 0 or total <= 0:
            what = f"video has {total} frames at {fps:g} per second"
            raise BadInput(Fault(where, what, "write it again with a constant frame rate"))
        wanted = sample_indices(total, fps, video)
        # Opened a second time: not every container can seek back to its beginning after the count.
        with av.open(io.BytesIO(data), "r", options=_OPTIONS) as container:
            taken = _read_frames(container, set(wanted))
    except av.FFmpegError as error:
        what = f"video cannot be read: {str(error)[:200]}"
        raise BadInput(Fault(where, what, _FORMATS)) from None
    if not taken:
        what = "no frame of the video can be decoded"
        raise BadInput(Fault(where, what, "write the file again"))
    if len({frame.shape for frame in taken.values()}) > 1:
        what = "frame size changes within the video"
        raise BadInput(Fault(where, what, "write the file again in one size"))
    indices = tuple(sorted(taken))
    frames = np.stack([taken[index] for index in indices])
    return Clip(frames, indices, fps)


def _check_frame_size(stream: VideoStream, where: str) -> None:
    if stream.width * stream.height > MAX_PIXELS:
        what = f"frames have {stream.width}x{stream.height} pixels, at most {MAX_PIXELS} are served"
        raise BadInput(Fault(where, what, "make them smaller"))


def _frame_rate(stream: VideoStream) -> float:
    """Frames per second as OpenCV reports them: the average, otherwise FFmpeg's guess.

    A short MPEG-TS has no average.
    """
    return float(stream.average_rate or stream.guessed_rate or 0)


def _frame_count(container: InputContainer, stream: VideoStream, fps: float) -> int:
    """Number of frames that can be shown: the header's count without those that are cut away.

    If the header has no count, it follows from the duration.
    """
    duration = container.duration / av.time_base if container.duration else 0.0
    if not duration and stream.duration and stream.time_base:
        duration = float(stream.duration * stream.time_base)
    total = stream.frames or math.floor(duration * fps + 0.5)
    # A clip that was cut without re-encoding keeps the frames before the cut in the file and hides
    # them with an edit list; the header counts them all the same. vLLM corrects the count if it
    # differs by two frames or more.
    shown = 0
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            shown += 1
    return shown if 0 < shown < total - 1 else total


def _read_frames(container: InputContainer, wanted: set[int]) -> dict[int, NDArray[np.uint8]]:
    """The wanted frames by index."""
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
    # Phones write portrait clips as landscape frames and a rotation, which OpenCV applies. Chroma
    # is scaled bicubically, as OpenCV does: FFmpeg's default differs by several grey levels at
    # coloured edges.
    pixels = frame.to_ndarray(format="rgb24", interpolation=Interpolation.BICUBIC)
    quarter_turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, k=quarter_turns))
