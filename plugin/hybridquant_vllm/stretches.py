"""Decodes a clip in parallel: what lies between two keyframes needs nothing from elsewhere."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock

import av
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from hybridquant_vllm.clip import OpenedClip
from hybridquant_vllm.conversion import ConvertedFrames
from hybridquant_vllm.pixels import Pool, worker_count

DECODER_POOL = Pool("hybridquant-decoder")
"""Decodes stretches; its tasks wait for `PIXEL_POOL` alone."""

_PARALLEL_CODECS = {"av1", "h264", "hevc", "vp9"}
"""Codecs of which a packet holds exactly one frame, with the time stamp of that frame."""

_SMALL_FRAME_PIXELS = 1280 * 720

_TIMED_FORMATS = {"mov", "matroska", "flv", "ivf"}
"""Containers whose time stamps are those at which frames are shown, and which begin with a
keyframe. AVI has those of decoding; MPEG-TS may begin within a stretch."""


@dataclass(frozen=True)
class Stretch:
    """Packets that can be decoded by themselves.

    Attributes:
        packets: From a keyframe to the last sampled frame.
        positions: Position among the sampled frames, by time stamp.
    """

    packets: list[Packet]
    positions: dict[int, int]


class StretchCount:
    """Counts the stretches of all clips that are being decoded or wait for it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._count = 0

    @contextlib.contextmanager
    def added(self, stretches: int) -> Iterator[int]:
        """Count more stretches for the length of a `with` block, and yield the number of all."""
        with self._lock:
            self._count += stretches
            count = self._count
        try:
            yield count
        finally:
            with self._lock:
                self._count -= stretches


_IN_DECODING = StretchCount()


class NotParallel(Exception):
    """A stretch did not give the frames that its packets promised."""


def divide(clip: OpenedClip, wanted: list[int]) -> list[Stretch]:
    """Divide a clip.

    Args:
        clip: A clip whose packets are read.
        wanted: Indices of the sampled frames, ascending.

    Returns:
        Those that hold sampled frames; none if the packets do not tell which frame is which.
    """
    if clip.stream.codec_context.name.removeprefix("lib") not in _PARALLEL_CODECS | {"dav1d"}:
        return []
    if not _TIMED_FORMATS & set(clip.container.format.name.split(",")):
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
        stretches.append(Stretch(clip.packets[start : last + 1], inside))
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


def decode_in_parallel(
    clip: OpenedClip, stretches: list[Stretch], converted: ConvertedFrames
) -> None:
    """Decode stretches on `DECODER_POOL`.

    Args:
        clip: The clip that was divided.
        stretches: From `divide`.
        converted: Takes the sampled frames.

    Raises:
        NotParallel: A stretch does not give the frames that its packets promise.
        FFmpegError: A stretch is damaged.
    """
    first = _first_frame(clip)
    converted.rotation = first.rotation
    futures: list[Future[None]] = []
    with _IN_DECODING.added(len(stretches)) as all_stretches:
        threads = _threads_of_a_stretch(first, all_stretches)
        for stretch in stretches:
            context = _decoder(clip.stream, first, threads)
            futures.append(DECODER_POOL.executor.submit(_decode, context, stretch, converted))
        # All are waited for, also after an error: they write into `converted`.
        errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error


def _threads_of_a_stretch(frame: VideoFrame, all_stretches: int) -> int:
    """Return on how many threads each stretch of a clip is decoded.

    Stretches share the cores. Where the cores cannot be divided evenly, large frames get a thread
    more; with small frames, starting it costs as much as it gains
    (benchmarks/results/decode_threads_h100.json).

    Args:
        frame: One of the clip's.
        all_stretches: Number of stretches, those of other clips included.
    """
    share = worker_count() / all_stretches
    if frame.width * frame.height <= _SMALL_FRAME_PIXELS:
        return max(1, math.floor(share))
    return math.ceil(share)


def _first_frame(clip: OpenedClip) -> VideoFrame:
    """Decode the first frame, which knows what only the container says: rotation and colours."""
    context = clip.stream.codec_context
    frames = [*context.decode(clip.packets[0]), *context.decode(None)]
    context.flush_buffers()
    if not frames:
        raise NotParallel
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


def _decode(context: VideoCodecContext, stretch: Stretch, converted: ConvertedFrames) -> None:
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
                    raise NotParallel
                missing.remove(frame.pts)
                converted.add(stretch.positions[frame.pts], frame)
    if missing:
        raise NotParallel
