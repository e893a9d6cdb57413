"""Decodes a clip and samples its frames; vLLM (through the plug-in) and calibration both use it.

With 2 fps and at most 128 frames, a clip of up to 64 seconds gives two frames per second, a longer
one 128 frames, uniformly. Which frames are taken equals vLLM 0.32 and 0.33 with their default
loader (vllm/multimodal/video.py, VideoBackend; video_decoders/opencv.py).

How a clip is decoded. Its packets are read once. A keyframe that no later frame precedes starts a
stretch that needs nothing from before it, so stretches are decoded in parallel, only those with
sampled frames, and only up to the last of them; of H.264, frames that no other frame refers to are
skipped. A stretch in which FFmpeg finds damage is decoded again, with what FFmpeg makes of the
damage. Where the packets do not say which frame is which (no or equal time stamps, MPEG-TS, other
codecs) or a stretch gives too few frames, the clip is decoded from its beginning and its frames are
counted, as OpenCV does. Frames are converted and resized as they come, so no more than two for each
core are held in full size.

What the pixels are. YUV is converted to RGB of 8 bits with the matrix and range that the file
states (BT.601 where it states none), chroma interpolated bicubically. HDR (10 bits, PQ or HLG,
BT.2020) gets the same conversion: its matrix is applied, but no tone mapping, so it looks pale. The
two fields of interlaced video stay woven in one frame. Rotation is applied, as is an edit list.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from hybridquant_vllm.clip import Clip, ClipError, OpenedClip
from hybridquant_vllm.conversion import ConvertedFrames
from hybridquant_vllm.mp4_index import check_index
from hybridquant_vllm.stretches import NotParallel, decode_stretches, divide, is_timed

__all__ = ["MAX_FRAME_PIXELS", "Clip", "ClipError", "read_clip", "sample_indices"]

MAX_FRAME_PIXELS = 4096 * 4096
"""Larger frames are refused: 4K video passes, 8K video would take seconds for each request."""

MAX_SECONDS = 4 * 3600
"""Longer clips are refused: reading their packets alone would hold up a server."""

MAX_PACKETS = 1_000_000
"""Most packets of a clip: four hours at 69 frames per second."""

_MOST_READINGS = 4
"""How often the packets of a file may hold its bytes. An edit list, or entries of an index that
overlap, make a million packets of a small file, and reading those takes ten seconds."""

_INDEX_BYTES = 4
"""Bytes that a packet takes in a file beside its own; no format needs less for small packets."""

# A playlist may name other files and addresses; the given file is the only one that is read.
_OPTIONS = {"protocol_whitelist": "none"}

_REMEDY = "give MP4, WebM or GIF"


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
            limits above, its index is out of proportion, or no frame of it can be decoded.
    """
    check_index(data)
    sampling = (fps, max_frames, size, max_pixels)
    try:
        try:
            return _read_once(data, *sampling, functools.partial(_decode, parallel=parallel))
        except NotParallel:
            # Opened again: a decoder that was used keeps its threads, and frames that FFmpeg
            # would take for those that are lost.
            return _read_once(data, *sampling, functools.partial(_decode_in_order, is_damaged=True))
    except av.FFmpegError as error:
        raise ClipError(
            f"video cannot be read: {str(error.strerror or error)[:200]}", _REMEDY
        ) from None


def _read_once(
    data: bytes,
    fps: float,
    max_frames: int,
    size: tuple[int, int] | None,
    max_pixels: int,
    decode: Callable[[OpenedClip, list[int], ConvertedFrames], None],
) -> Clip:
    with _opened(data, max_pixels) as container:
        clip = _read_packets(container, max_pixels)
        wanted = sample_indices(clip.total, clip.fps, fps, max_frames)
        converted = ConvertedFrames(len(wanted), size, max_pixels)
        decode(clip, wanted, converted)
        frames, positions = converted.result()
    if not positions:
        # Of some formats, frames that are too large have no size until one is decoded.
        remedy = f"write the file again, with at most {max_pixels} pixels a frame"
        raise ClipError("no frame of the video can be decoded", remedy)
    indices = tuple(wanted[position] for position in positions)
    return Clip(frames, indices, clip.fps, clip.total)


def _opened(data: bytes, max_pixels: int) -> InputContainer:
    # Opening decodes a few frames, so that it needs the limit on their size as well.
    options = _OPTIONS | {"max_pixels": str(max_pixels)}
    # Titles in other encodings than UTF-8 would raise UnicodeDecodeError.
    return av.open(io.BytesIO(data), "r", options=options, metadata_errors="ignore")


def _read_packets(container: InputContainer, max_pixels: int) -> OpenedClip:
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
    if stream.frames > MAX_PACKETS:
        raise _too_many_frames()
    packets = _packets(container, stream)
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
    return OpenedClip(container, stream, packets, fps, total, is_whole)


def _packets(container: InputContainer, stream: VideoStream) -> list[Packet]:
    """Return all packets; of a file that is damaged within, those before the damage.

    Raises:
        ClipError: There are too many, for a clip or for a file of this size.
        FFmpegError: The first one cannot be read.
    """
    packets: list[Packet] = []
    bytes_left = _MOST_READINGS * container.size
    try:
        for packet in container.demux(stream):
            if packet.size:
                packets.append(packet)
            bytes_left -= packet.size + _INDEX_BYTES
            if bytes_left < 0:
                what = f"video's index shows the same frames more than {_MOST_READINGS} times"
                raise ClipError(what, "write the file again")
            if len(packets) > MAX_PACKETS:
                raise _too_many_frames()
    except av.FFmpegError:
        if not packets:
            raise
    except IndexError:
        # Trap: PyAV 18.1 raises it behind the last packet if streams begin within the file that
        # its head does not name, as in a damaged MPEG-TS file.
        if not packets:
            raise ClipError("video has no frames", _REMEDY) from None
    return packets


def _too_many_frames() -> ClipError:
    what = f"video has more than {MAX_PACKETS} frames"
    return ClipError(what, "cut it, or write it at a lower rate")


def _film(container: InputContainer) -> VideoStream:
    """Return the first stream with moving pictures."""
    name = container.format.name
    if name == "image2" or name.endswith("_pipe"):
        raise ClipError(f"file is a picture ({name.removesuffix('_pipe')})", "send it as an image")
    streams = container.streams.video
    if not streams:
        raise ClipError("file has no video stream", _REMEDY)
    films = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
    for stream in films:
        if stream.codec_context is not None:
            return stream
    if films:
        raise ClipError("video has a codec that FFmpeg does not know", _REMEDY)
    raise ClipError("file has no video stream, only a cover picture", _REMEDY)


def _decode(
    clip: OpenedClip, wanted: list[int], converted: ConvertedFrames, parallel: bool
) -> None:
    """Decode by stretches if the clip allows it, otherwise from its beginning.

    Raises:
        NotParallel: Stretches do not give the frames that they promise.
    """
    stretches = divide(clip, wanted)
    if stretches:
        decode_stretches(clip, stretches, converted, parallel)
    else:
        _decode_in_order(clip, wanted, converted, is_damaged=is_timed(clip))


def _decode_in_order(
    clip: OpenedClip, wanted: list[int], converted: ConvertedFrames, is_damaged: bool
) -> None:
    """Decode from the beginning and count the frames.

    Args:
        clip: A clip that nothing is decoded of.
        wanted: Indices of the sampled frames, ascending.
        converted: Takes the sampled frames.
        is_damaged: Whether to use one thread, and to convert each frame before the next packet is
            decoded. FFmpeg paints over damage with what is in its buffers: with frames that other
            threads are decoding, and with old frames that happen to be given back.
    """
    positions = {index: position for position, index in enumerate(wanted)}
    add = converted.add_now if is_damaged else converted.add
    context = clip.stream.codec_context
    context.thread_type = "NONE" if is_damaged else "AUTO"
    index = 0
    packets: list[Packet | None] = [*clip.packets, None]
    for packet in packets:
        try:
            frames = context.decode(packet)
        except av.FFmpegError:
            continue  # a damaged packet loses its own frame, not the clip
        for frame in frames:
            if index in positions:
                converted.rotation = frame.rotation
                add(positions[index], frame)
            index += 1
        if index > wanted[-1]:
            break
