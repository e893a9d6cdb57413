"""Clips as people have them, made in the test."""

import io
import os
from fractions import Fraction

import av
import numpy as np


def picture(number: int, width: int, height: int) -> np.ndarray:
    """A gradient with a bar whose place and colour tell the frame's number."""
    across = np.linspace(20, 230, width)[None].repeat(height, 0)
    down = np.linspace(230, 20, height)[:, None].repeat(width, 1)
    pixels = np.stack([across, down, (across + down) / 2], -1).astype(np.uint8)
    at = number * 5 % (width - 8)
    pixels[:, at : at + 8] = (number * 40 % 256, 255 - number * 3 % 256, 128)
    return pixels


def clip(
    frames: int = 40,
    fps: int = 10,
    form: str = "mp4",
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    size: tuple[int, int] = (96, 64),
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: int = 0,
    title: bytes | None = None,
) -> bytes:
    """A clip whose every frame differs.

    Trap: SVT-AV1's encoder gives the whole process real-time scheduling where it runs as root.
    Symptom: this process and its children take both cores from everything else, and a child that
    waits for its own children, as VLMEvalKit's scoring does, never ends.
    """
    policy = os.sched_getscheduler(0)
    parameters = os.sched_getparam(0)
    try:
        return _encoded(
            frames,
            fps,
            form,
            codec,
            pixel_format,
            size,
            options,
            container_options,
            rotation,
            title,
        )
    finally:
        os.sched_setscheduler(0, policy, parameters)


def _encoded(
    frames, fps, form, codec, pixel_format, size, options, container_options, rotation, title
) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form, options=container_options or {}) as container:
        if title is not None:
            container.metadata["title"] = "T" * len(title)
        stream = container.add_stream(codec, rate=Fraction(fps), options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=pixel_format)))
        container.mux(stream.encode())
    data = buffer.getvalue()
    if title is not None:
        data = data.replace(b"T" * len(title), title)
    return data


def sound(cover: bool = False) -> bytes:
    """Silence; with a cover picture beside it on request."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4" if cover else "wav") as container:
        stream = container.add_stream("aac" if cover else "pcm_s16le", rate=8000, layout="mono")
        if cover:
            art = container.add_stream("png", rate=1)
            art.width, art.height, art.pix_fmt = 32, 32, "rgb24"
            art.disposition = av.stream.Disposition.attached_pic
            container.mux(art.encode(av.VideoFrame.from_ndarray(picture(0, 32, 32), "rgb24")))
            container.mux(art.encode())
        form = "fltp" if cover else "s16"
        kind = np.float32 if cover else np.int16
        for number in range(8):
            samples = np.zeros((1, 1024), kind)
            frame = av.AudioFrame.from_ndarray(samples, format=form, layout="mono")
            frame.sample_rate = 8000
            frame.pts = number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


SHORT_GROUPS = {"g": "7", "bf": "3"}

HDR = "log-level=error:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"

CLIPS = {
    "h264, short groups": clip(90, 30, options=SHORT_GROUPS),
    "h264, one group": clip(60, 12, options={"g": "600"}),
    "h264, open groups": clip(
        60, 12, "matroska", options={**SHORT_GROUPS, "x264-params": "open-gop=1"}
    ),
    "h264, rotated": clip(40, options=SHORT_GROUPS, rotation=90),
    "h264, colours of the container": clip(
        40, options=SHORT_GROUPS | {"x264-params": "colormatrix=bt709:fullrange=on"}
    ),
    "hevc": clip(60, 12, codec="libx265", options={"x265-params": "keyint=9:log-level=error"}),
    "vp9": clip(40, form="webm", codec="libvpx-vp9", options={"g": "8"}),
    "gif": clip(20, 5, "gif", "gif", "rgb8"),
    "mpeg4": clip(40, codec="mpeg4"),
}
"""Clips that OpenCV reads as well."""

ODD_CLIPS = {
    "av1": clip(30, codec="libsvtav1", options={"svtav1-params": "keyint=8"}),
    "mpeg-ts": clip(form="mpegts"),
    "one frame": clip(1),
    "no duration": clip(30, form="webm", codec="libvpx", container_options={"live": "1"}),
    "raw h264": clip(form="h264"),
    "interlaced": clip(options={"flags": "+ildct+ilme", "x264-params": "tff=1"}, size=(96, 96)),
    "hdr": clip(
        codec="libx265",
        pixel_format="yuv420p10le",
        options={"x265-params": HDR},
    ),
    "title in another encoding": clip(title=b"Caf\xe9 Ol\xe9"),
    "every frame a keyframe": clip(codec="mjpeg", form="avi", pixel_format="yuvj420p"),
}
"""Clips that OpenCV loses, misreads or refuses, and their like."""
