"""Decodes a clip and samples its frames; vLLM (through the plug-in) and calibration both use it.

With 2 fps and at most 128 frames, a clip of up to 64 seconds gives two frames per second, a longer
one 128 frames, uniformly. Which frames are taken equals vLLM 0.32 and 0.33 with their default
loader (vllm/multimodal/video.py, VideoBackend; video_decoders/opencv.py).

How a clip is decoded. Its packets are read once. A keyframe that no later frame precedes starts a
stretch that needs nothing from before it, so stretches are decoded in parallel, only those with
sampled frames, and only up to the last of them; of H.264, frames that no other frame refers to are
skipped. Where the packets do not say which frame is which (no or equal time stamps, MPEG-TS, other
codecs) or a stretch is damaged, the clip is decoded from its beginning and its frames are counted,
as OpenCV does. Frames are converted and resized as they come, so no more than two for each core
are held in full size.

What the pixels are. YUV is converted to RGB of 8 bits with the matrix and range that the file
states (BT.601 where it states none), chroma interpolated bicubically. HDR (10 bits, PQ or HLG,
BT.2020) gets the same conversion: its matrix is applied, but no tone mapping, so it looks pale. The
two fields of interlaced video stay woven in one frame. Rotation is applied, as is an edit list.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from threading import BoundedSemaphore, Lock, local

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from hybridquant_vllm.pixels import PIXEL_POOL, Pool, resize, worker_count

MAX_FRAME_PIXELS = 4096 * 4096
"""Larger frames are refused: 4K video passes, 8K video would take seconds for each request."""

MAX_SECONDS = 4 * 3600
"""Longer clips are refused: reading their packets alone would hold up a server."""

MAX_PACKETS = 1_000_000
"""Most packets of a clip: four hours at 69 frames per second."""

DECODER_POOL = Pool("hybridquant-decoder")
"""Decodes stretches; its tasks wait for `PIXEL_POOL` alone."""

# A playlist may name other files and addresses; the given file is the only one that is read.
_OPTIONS = {"protocol_whitelist": "none"}

_REMEDY = "give MP4, WebM or GIF"

_PARALLEL_CODECS = {"av1", "h264", "hevc", "vp9"}
"""Codecs of which a packet holds exactly one frame, with the time stamp of that frame."""

_COUNTED_FORMATS = {"mpegts", "h264", "hevc"}
"""Containers that may begin within a stretch, or have no time stamps of their own."""


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
class _Opened:
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


@dataclass(frozen=True)
class _Stretch:
    """Packets that can be decoded by themselves.

    Attributes:
        packets: From a keyframe to the last sampled frame.
        positions: Position among the sampled frames, by time stamp.
    """

    packets: list[Packet]
    positions: dict[int, int]


class _NotParallel(Exception):
    """A stretch did not give the frames that its packets promised."""


def sample_indices(total: int, rate: float, fps: float, max_frames: int) -> list[int]:
    """Return the indices of the frames to take, first and last included if there are several.

    Args:
        total: Frames in the file, > 0.
        rate: Frame rate of the file; 0 if unknown.
        fps: Frames to take per second; 0 or less takes any number.
        max_frames: Most frames to take; 0 or less takes any number.
    """
    count = total
    if max_frames > 0:
        count = min(count, max_frames)
    if fps > 0:
        duration = total / rate if rate > 0 else 0.0
        count = min(count, math.floor(duration * fps))
    count = max(1, count)
    if count == total:
        return list(range(total))
    return np.linspace(0, total - 1, count, dtype=int).tolist()


def read_clip(
    data: bytes,
    *,
    fps: float,
    max_frames: int,
    size: tuple[int, int] | None = None,
    max_pixels: int = MAX_FRAME_PIXELS,
    parallel: bool = True,
) -> Clip:
    """Decode a video file and sample it.

    Frames that cannot be decoded are left out; the others keep their indices.

    Args:
        data: The file: anything that FFmpeg reads, MP4, WebM and GIF among them.
        fps: Frames to take per second.
        max_frames: Most frames to take.
        size: (height, width) that frames are resized to; None keeps the size of the file.
        max_pixels: Most pixels of a frame of the file.
        parallel: Whether stretches may be decoded in parallel; the frames are the same.

    Raises:
        ClipError: It is not a video, its frame rate is unknown, it is longer or larger than the
            limits above, or no frame of it can be decoded.
    """
    try:
        # Titles in other encodings than UTF-8 would raise UnicodeDecodeError.
        with av.open(io.BytesIO(data), "r", options=_OPTIONS, metadata_errors="ignore") as opened:
            clip = _read_packets(opened, max_pixels)
            return _sample(clip, fps, max_frames, size, max_pixels, parallel)
    except av.FFmpegError as error:
        raise ClipError(f"video cannot be read: {str(error)[:200]}", _REMEDY) from None


def _read_packets(container: InputContainer, max_pixels: int) -> _Opened:
    stream = _film(container)
    pixels = stream.width * stream.height
    if pixels > max_pixels:
        size = f"{stream.width}x{stream.height}"
        what = f"frames have {size} pixels, at most {max_pixels} are served"
        raise ClipError(what, "make them smaller")
    stream.codec_context.options = {"max_pixels": str(max_pixels)}
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    duration = container.duration / av.time_base if container.duration else 0.0
    if not duration and stream.duration and stream.time_base:
        duration = float(stream.duration * stream.time_base)
    if duration > MAX_SECONDS:
        what = f"video is {duration:.0f} seconds long, at most {MAX_SECONDS} are served"
        raise ClipError(what, "cut it")
    packets = []
    for packet in container.demux(stream):
        if packet.size:
            packets.append(packet)
        if len(packets) > MAX_PACKETS:
            what = f"video has more than {MAX_PACKETS} frames"
            raise ClipError(what, "cut it, or write it at a lower rate")
    shown = sum(not packet.is_discard for packet in packets)
    total = stream.frames or math.floor(duration * fps + 0.5)
    is_whole = len(packets) >= total - 1
    # A clip that was cut without re-encoding keeps the frames before the cut in the file and hides
    # them with an edit list; the header counts them all the same. vLLM corrects the count if it
    # differs by two frames or more. A recording of a browser has no count, and no duration.
    if total <= 0 or 0 < shown < total - 1:
        total = shown
    if fps <= 0 or total <= 0:
        what = f"video has {total} frames at {fps:g} per second"
        raise ClipError(what, "write it again with a constant frame rate")
    return _Opened(container, stream, packets, fps, total, is_whole)


def _film(container: InputContainer) -> VideoStream:
    """Return the first stream with moving pictures."""
    name = container.format.name
    if name == "image2" or name.endswith("_pipe"):
        raise ClipError(f"file is a picture ({name.removesuffix('_pipe')})", "send it as an image")
    streams = container.streams.video
    if not streams:
        raise ClipError("file has no video stream", _REMEDY)
    for stream in streams:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    raise ClipError("file has no video stream, only a cover picture", _REMEDY)


def _sample(
    clip: _Opened,
    fps: float,
    max_frames: int,
    size: tuple[int, int] | None,
    max_pixels: int,
    parallel: bool,
) -> Clip:
    wanted = sample_indices(clip.total, clip.fps, fps, max_frames)
    stretches = _stretches(clip, wanted) if parallel else []
    taken = None
    if stretches:
        try:
            taken = _decode_stretches(clip, stretches, _Taken(len(wanted), size, max_pixels))
        except (_NotParallel, av.FFmpegError):
            clip.stream.codec_context.flush_buffers()
    if taken is None:
        taken = _decode_and_count(clip, wanted, _Taken(len(wanted), size, max_pixels))
    frames, positions = taken.result()
    if not positions:
        raise ClipError("no frame of the video can be decoded", "write the file again")
    indices = tuple(wanted[position] for position in positions)
    return Clip(frames, indices, clip.fps, clip.total)


def _stretches(clip: _Opened, wanted: list[int]) -> list[_Stretch]:
    """Divide a clip; the list is empty if its packets do not tell which frame is which."""
    if clip.stream.codec_context.name.removeprefix("lib") not in _PARALLEL_CODECS | {"dav1d"}:
        return []
    if _COUNTED_FORMATS & set(clip.container.format.name.split(",")):
        return []
    # OpenCV counts the frames that a damaged file still gives, whatever their time stamps are.
    if not clip.is_whole:
        return []
    stamps: list[int] = []
    for packet in clip.packets:
        if packet.pts is None or packet.is_corrupt:
            return []
        stamps.append(packet.pts)
    shown = [stamp for stamp, packet in zip(stamps, clip.packets) if not packet.is_discard]
    shown.sort()
    if len(set(stamps)) < len(stamps) or wanted[-1] >= len(shown):
        return []
    if not clip.packets[0].is_keyframe:
        return []
    positions = {shown[index]: position for position, index in enumerate(wanted)}
    stretches = []
    for start, end in _independent_ranges(clip.packets, stamps):
        inside = {stamp: positions[stamp] for stamp in stamps[start:end] if stamp in positions}
        if not inside:
            continue
        last = max(place for place in range(start, end) if stamps[place] in inside)
        stretches.append(_Stretch(clip.packets[start : last + 1], inside))
    return stretches


def _independent_ranges(packets: list[Packet], stamps: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of packets between keyframes that no later frame precedes.

    With an open group of pictures, frames that are shown before a keyframe follow it in the file
    and refer to frames before it: such a keyframe starts no range.
    """
    end = len(packets)
    earliest_after = math.inf
    starts = []
    for place in range(len(packets) - 1, -1, -1):
        if packets[place].is_keyframe and earliest_after > stamps[place]:
            starts.append(place)
        earliest_after = min(earliest_after, stamps[place])
    starts.reverse()
    yield from zip(starts, [*starts[1:], end])


def _decode_stretches(clip: _Opened, stretches: list[_Stretch], taken: _Taken) -> _Taken:
    first = _first_frame(clip)
    taken.rotation = first.rotation
    threads = math.ceil(worker_count() / len(stretches))
    futures: list[Future[None]] = []
    for stretch in stretches:
        context = _decoder(clip.stream, first, threads)
        task = DECODER_POOL.executor.submit(_decode_stretch, context, stretch, taken)
        futures.append(task)
    # All are waited for, also after an error: they write into `taken`.
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
    return taken


def _first_frame(clip: _Opened) -> VideoFrame:
    """Decode the first frame, which knows what only the container says: rotation and colours."""
    context = clip.stream.codec_context
    frames = [*context.decode(clip.packets[0]), *context.decode(None)]
    context.flush_buffers()
    if not frames:
        raise _NotParallel
    return frames[0]


def _decoder(stream: VideoStream, first: VideoFrame, threads: int) -> VideoCodecContext:
    context = av.CodecContext.create(stream.codec_context.codec, "r")
    assert isinstance(context, VideoCodecContext)
    context.extradata = stream.codec_context.extradata
    context.options = dict(stream.codec_context.options)
    context.colorspace = first.colorspace
    context.color_range = first.color_range
    context.thread_count = threads
    context.thread_type = "FRAME" if threads > 1 else "NONE"
    return context


def _decode_stretch(context: VideoCodecContext, stretch: _Stretch, taken: _Taken) -> None:
    # Only H.264 says of each frame whether any other refers to it: HEVC's flag leaves out frames
    # of higher temporal layers.
    may_skip = context.name == "h264"
    missing = set(stretch.positions)
    packets: list[Packet | None] = [*stretch.packets, None]
    for packet in packets:
        if may_skip and packet is not None:
            context.skip_frame = "DEFAULT" if packet.pts in stretch.positions else "NONREF"
        for frame in context.decode(packet):
            if frame.pts in missing:
                if frame.is_corrupt:
                    raise _NotParallel
                missing.remove(frame.pts)
                taken.add(stretch.positions[frame.pts], frame)
    if missing:
        raise _NotParallel


def _decode_and_count(clip: _Opened, wanted: list[int], taken: _Taken) -> _Taken:
    """Decode from the beginning and count the frames."""
    positions = {index: position for position, index in enumerate(wanted)}
    context = clip.stream.codec_context
    if not context.is_open:
        context.thread_type = "AUTO"
    index = 0
    packets: list[Packet | None] = [*clip.packets, None]
    for packet in packets:
        try:
            frames = context.decode(packet)
        except av.FFmpegError:
            continue  # a damaged packet loses its own frame, not the clip
        for frame in frames:
            if index in positions:
                taken.rotation = frame.rotation
                taken.add(positions[index], frame)
            index += 1
        if index > wanted[-1]:
            break
    return taken


_reformatters = local()
"""A reformatter for each thread: setting one up takes as long as a conversion."""

_SLOTS = BoundedSemaphore(2 * worker_count())
"""Limits the frames that all clips together hold in full size."""


class _Taken:
    """Frames that are being converted and resized.

    Args:
        count: Number of frames.
        size: (height, width) of the result; None keeps the size of the frames.
        max_pixels: Most pixels of a frame.

    Attributes:
        rotation: Degrees by which frames are turned counterclockwise.
    """

    def __init__(self, count: int, size: tuple[int, int] | None, max_pixels: int) -> None:
        self.rotation = 0
        self._count = count
        self._size = size
        self._max_pixels = max_pixels
        self._lock = Lock()
        self._source: tuple[int, int] | None = None
        self._pixels: NDArray[np.uint8] | None = None
        self._tasks: dict[int, Future[None]] = {}

    def add(self, position: int, frame: VideoFrame) -> None:
        """Convert a frame on another thread; wait while too many are held."""
        with self._lock:
            self._prepare(frame)
        _SLOTS.acquire()
        task = PIXEL_POOL.executor.submit(self._convert, position, frame)
        task.add_done_callback(lambda _: _SLOTS.release())
        with self._lock:
            self._tasks[position] = task

    def result(self) -> tuple[NDArray[np.uint8], list[int]]:
        """Wait for all frames.

        Returns:
            uint8 [frames, height, width, 3], and the position of each.
        """
        for task in self._tasks.values():
            task.result()
        positions = sorted(self._tasks)
        if self._pixels is None:
            return np.empty((0, 0, 0, 3), np.uint8), []
        if len(positions) == self._count:
            return self._pixels, positions
        return self._pixels[positions], positions

    def _prepare(self, frame: VideoFrame) -> None:
        """Allocate the result at the first frame; the others must have its size."""
        source = (frame.height, frame.width)
        if self._source is None:
            if frame.height * frame.width > self._max_pixels:
                what = f"frames have {frame.width}x{frame.height} pixels"
                raise ClipError(f"{what}, at most {self._max_pixels} are served", "shrink them")
            self._source = source
            turned = source[::-1] if self._quarter_turns % 2 else source
            height, width = self._size or turned
            self._pixels = np.empty((self._count, height, width, 3), np.uint8)
        if source != self._source:
            what = "frame size changes within the video"
            raise ClipError(what, "write the file again in one size")

    @property
    def _quarter_turns(self) -> int:
        # Phones write portrait clips as landscape frames and a rotation, which OpenCV applies.
        return round(self.rotation / 90) % 4

    def _convert(self, position: int, frame: VideoFrame) -> None:
        reformatter = getattr(_reformatters, "value", None)
        if reformatter is None:
            reformatter = _reformatters.value = VideoReformatter()
        # Chroma is scaled bicubically, as OpenCV does: FFmpeg's default differs by several grey
        # levels at coloured edges.
        rgb = reformatter.reformat(
            frame, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1
        )
        upright = np.rot90(rgb.to_ndarray(), k=self._quarter_turns)
        assert self._pixels is not None
        place = self._pixels[position]
        place[:] = resize(np.ascontiguousarray(upright), *place.shape[:2])
