"""Clips for measuring: a film cut and looped to a length, no two with the same frames or bytes."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path


def looped(film: Path, seconds: float, number: int = 0, start: int = 0) -> bytes:
    """Repeat a film without encoding it again.

    Args:
        film: An MP4 file that begins with a keyframe and has no B frames before it.
        seconds: Length of the clip.
        number: Goes into the clip's title, so that a server has not seen its bytes.
        start: The keyframe to begin at, counted from 0; after the last one it goes on at the first.

    Returns:
        An MP4 file.
    """
    import av
    from av.packet import Packet

    buffer = io.BytesIO()
    with av.open(str(film)) as source, av.open(buffer, "w", format="mp4") as target:
        target.metadata["title"] = f"clip {number}"
        stream = source.streams.video[0]
        assert stream.average_rate is not None
        assert stream.time_base is not None
        frames = round(seconds * float(stream.average_rate))
        copied = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        keyframes = [place for place, packet in enumerate(packets) if packet.is_keyframe]
        begin = keyframes[start % len(keyframes)]
        step = round(1 / (stream.average_rate * stream.time_base))
        first = min(packet.pts or 0 for packet in packets) + begin * step
        for index in range(begin, begin + frames):
            loop, place = divmod(index, len(packets))
            original = packets[place]
            packet = Packet(bytes(original))
            packet.is_keyframe = original.is_keyframe
            shift = loop * len(packets) * step - first
            packet.pts = (original.pts or 0) + shift
            packet.dts = (original.dts or 0) + shift
            packet.duration = step
            packet.time_base = stream.time_base
            packet.stream = copied
            target.mux(packet)
    return buffer.getvalue()


def scaled(
    film: Path,
    width: int,
    height: int,
    out: Path,
    keyframe_every: int = 250,
    most_frames: int | None = None,
) -> None:
    """Encode a film in another size, as H.264 without B frames.

    Args:
        film: A file that FFmpeg reads.
        width: In pixels, even.
        height: In pixels, even.
        out: MP4 file to write.
        keyframe_every: Most frames between two keyframes.
        most_frames: Frames to take from the beginning; all of them when None.
    """
    import av

    with av.open(str(film)) as source, av.open(str(out), "w") as target:
        stream = source.streams.video[0]
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        options = {"preset": "veryfast", "bf": "0", "g": str(keyframe_every)}
        encoded = target.add_stream("libx264", rate=rate, options=options)
        encoded.width, encoded.height, encoded.pix_fmt = width, height, "yuv420p"
        for number, frame in enumerate(source.decode(stream)):
            if number == most_frames:
                break
            image = frame.reformat(width, height, "yuv420p")
            # `looped` counts frames, so each lasts equally long here.
            image.pts = number
            image.time_base = 1 / rate
            target.mux(encoded.encode(image))
        target.mux(encoded.encode())


def is_picture(film: Path) -> bool:
    """Return whether a file holds a picture, whatever it is called.

    Raises:
        av.FFmpegError: FFmpeg reads no medium in it.
    """
    import av

    with av.open(str(film)) as source:
        name = source.format.name
    return name == "image2" or name.endswith("_pipe")


def frame_size(film: Path) -> tuple[int, int]:
    """Return width and height of a film's frames in pixels, both rounded down to even numbers.

    Raises:
        av.FFmpegError: It is not a film.
        IndexError: It has no video stream.
    """
    import av

    with av.open(str(film)) as source:
        stream = source.streams.video[0]
        return stream.width // 2 * 2, stream.height // 2 * 2
