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

_STRICT = {"err_detect": "explode"}
"""Option of a decoder that makes damage an error."""

_TOLERANT: dict[str, str] = {}
"""Left to itself, FFmpeg paints over the damaged parts of a frame from the frames around it."""

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


_BEING_DECODED = StretchCount()


class NotParallel(Exception):
    """A stretch did not give the frames that its packets promised."""


class _Damaged(Exception):
    """A frame is damaged."""


def is_timed(clip: OpenedClip) -> bool:
    """Return whether packets of such a file say which frame is which, unless it is damaged."""
    if clip.stream.codec_context.name.removeprefix("lib") not in _PARALLEL_CODECS | {"dav1d"}:
        return False
    return bool(_TIMED_FORMATS & set(clip.container.format.name.split(",")))


def divide(clip: OpenedClip, wanted: list[int]) -> list[Stretch]:
    """Divide a clip.

    Args:
        clip: A clip whose packets are read.
        wanted: Indices of the sampled frames, ascending.

    Returns:
        Those that hold sampled frames; none if the packets do not tell which frame is which.
    """
    if not is_timed(clip):
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


def decode_stretches(
    clip: OpenedClip, stretches: list[Stretch], converted: ConvertedFrames, parallel: bool
) -> None:
    """Decode stretches; the frames are the same in parallel and one stretch after the other.

    Args:
        clip: The clip that was divided.
        stretches: From `divide`.
        converted: Takes the sampled frames; those that cannot be decoded are left out.
        parallel: Whether to decode them in parallel, on `DECODER_POOL`.

    Raises:
        NotParallel: A stretch does not give the frames that its packets promise, though FFmpeg
            finds no damage; or no stretch can be decoded.
    """
    first = _first_frame(clip, stretches)
    converted.rotation = first.rotation
    if not parallel:
        for stretch in stretches:
            _decode(clip.stream, first, 1, stretch, converted)
        return
    futures: list[Future[None]] = []
    with _BEING_DECODED.added(len(stretches)) as stretch_count:
        threads = _threads_of_a_stretch(first, stretch_count)
        for stretch in stretches:
            task = (clip.stream, first, threads, stretch, converted)
            futures.append(DECODER_POOL.executor.submit(_decode, *task))
        # All are waited for, also after an error: they write into `converted`.
        errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error


def _threads_of_a_stretch(frame: VideoFrame, stretch_count: int) -> int:
    """Return the number of threads that decode each stretch of a clip.

    Stretches share the cores. Where the cores cannot be divided evenly, large frames get a thread
    more; with small frames, starting it costs as much as it gains
    (benchmarks/results/decode_threads_h100.json).

    Args:
        frame: One of the clip's.
        stretch_count: Stretches that are being decoded, those of other clips included.
    """
    share = worker_count() / stretch_count
    if frame.width * frame.height <= _SMALL_FRAME_PIXELS:
        return max(1, math.floor(share))
    return math.ceil(share)


def _first_frame(clip: OpenedClip, stretches: list[Stretch]) -> VideoFrame:
    """Decode the first frame that can be, for what only the container says: rotation and colours.

    Raises:
        NotParallel: There is none.
    """
    context = clip.stream.codec_context
    for packet in (clip.packets[0], *(stretch.packets[0] for stretch in stretches)):
        try:
            frames = [*context.decode(packet), *context.decode(None)]
        except av.FFmpegError:
            frames = []
        context.flush_buffers()
        if frames:
            return frames[0]
    raise NotParallel


def _decode(
    stream: VideoStream,
    first: VideoFrame,
    threads: int,
    stretch: Stretch,
    converted: ConvertedFrames,
) -> None:
    """Decode a stretch; if it is damaged, once more, keeping what FFmpeg makes of the damage.

    That is done on one thread: frames that FFmpeg decodes at once take what is missing from each
    other, and what they take depends on the number of threads and on which comes first.
    """
    missing = set(stretch.positions)
    try:
        strict = _decoder(stream, first, threads, _STRICT)
        for stamp, frame in _frames(strict, stretch, missing):
            if frame.is_corrupt:
                raise _Damaged
            missing.remove(stamp)
            converted.add(stretch.positions[stamp], frame)
    except (_Damaged, av.FFmpegError):
        tolerant = _decoder(stream, first, 1, _TOLERANT)
        for stamp, frame in _frames(tolerant, stretch, missing):
            missing.remove(stamp)
            converted.add_now(stretch.positions[stamp], frame)
    else:
        if missing:
            raise NotParallel


def _decoder(
    stream: VideoStream, first: VideoFrame, threads: int, options: dict[str, str]
) -> VideoCodecContext:
    context = av.CodecContext.create(stream.codec_context.codec, "r")
    assert isinstance(context, VideoCodecContext)
    context.extradata = stream.codec_context.extradata
    context.options = stream.codec_context.options | options
    context.colorspace = first.colorspace
    context.color_range = first.color_range
    context.thread_count = threads
    context.thread_type = "FRAME" if threads > 1 else "NONE"
    return context


def _frames(
    context: VideoCodecContext, stretch: Stretch, missing: set[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield the frames of a stretch that are missing, with their time stamps.

    Raises:
        FFmpegError: A packet is damaged and the decoder is strict.
    """
    # Only H.264 says of each frame whether any other refers to it: HEVC's flag leaves out frames
    # of higher temporal layers.
    may_skip = context.name == "h264"
    is_strict = context.options.items() >= _STRICT.items()
    packets: list[Packet | None] = [*stretch.packets, None]
    for packet in packets:
        if may_skip and packet is not None:
            context.skip_frame = "DEFAULT" if packet.pts in stretch.positions else "NONREF"
        try:
            frames = context.decode(packet)
        except av.FFmpegError:
            if is_strict:
                raise
            continue  # a damaged packet loses its own frame, not the stretch
        for frame in frames:
            if frame.pts is not None and frame.pts in missing:
                yield frame.pts, frame
