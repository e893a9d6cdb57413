"""Clips for measuring: a film looped to a length, each with bytes of its own."""

from __future__ import annotations

import io
from pathlib import Path

import av
from av.packet import Packet


def looped(film: Path, seconds: float, number: int = 0) -> bytes:
    """Repeat a film without encoding it again.

    Args:
        film: An MP4 file that begins with a keyframe and has no B frames before it.
        seconds: Length of the clip.
        number: Goes into the clip's title, so that a server has not seen its bytes.

    Returns:
        An MP4 file.
    """
    buffer = io.BytesIO()
    with av.open(str(film)) as source, av.open(buffer, "w", format="mp4") as target:
        target.metadata["title"] = f"clip {number}"
        stream = source.streams.video[0]
        assert stream.average_rate is not None
        assert stream.time_base is not None
        frames = round(seconds * float(stream.average_rate))
        copied = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        step = round(1 / (stream.average_rate * stream.time_base))
        first = min(packet.pts or 0 for packet in packets)
        for index in range(frames):
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


def scaled(film: Path, width: int, height: int, out: Path) -> None:
    """Encode a film in another size (H.264, a keyframe every 250 frames at most).

    Args:
        film: A file that FFmpeg reads.
        width: In pixels.
        height: In pixels.
        out: MP4 file to write.
    """
    with av.open(str(film)) as source, av.open(str(out), "w") as target:
        stream = source.streams.video[0]
        options = {"preset": "veryfast", "bf": "0"}
        encoded = target.add_stream("libx264", rate=stream.average_rate, options=options)
        encoded.width, encoded.height, encoded.pix_fmt = width, height, "yuv420p"
        for frame in source.decode(stream):
            target.mux(encoded.encode(frame.reformat(width, height, "yuv420p")))
        target.mux(encoded.encode())
