"""Small pictures and clips, made in the test, and the chat parts that hold them."""

import base64
import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours with noise on them: resizing has something to get wrong."""
    random = np.random.RandomState(seed)
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(255, 0, height))
    noise = random.randint(0, 60, (height, width))
    layers = [across, down, (across + down) / 2, 255 - across]
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}.get(mode, 3)
    smooth = np.stack(layers[:channels], -1) * 0.8
    pixels = np.clip(smooth + noise[..., None], 0, 255).astype(np.uint8)
    if mode == "L":
        return Image.fromarray(pixels[..., 0])
    image = Image.fromarray(pixels)
    if image.mode == mode:
        return image
    return image.convert(mode)


def image_bytes(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def data_url(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def image_part(image: Image.Image, form: str = "PNG", **options) -> dict:
    url = data_url(image_bytes(image, form, **options), f"image/{form.lower()}")
    return {"type": "image_url", "image_url": {"url": url}}


def clip_bytes(
    frames: int,
    fps,
    width: int = 64,
    height: int = 48,
    form: str = "mp4",
    codec: str = "mpeg4",
    rotation: int = 0,
    slow_from: int | None = None,
) -> bytes:
    """A clip whose every frame differs: a bar moves over a gradient; from frame `slow_from` ten
    times as slowly.
    """
    buffer = io.BytesIO()
    step = 1 / Fraction(fps)
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.width = width
        stream.height = height
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if slow_from is not None:
            stream.codec_context.time_base = step
        if rotation:
            stream.set_display_rotation(rotation)
        base = np.array(picture(width, height))
        for number in range(frames):
            pixels = base.copy()
            at = number * 5 % width
            pixels[:, at : at + 8] = (number * 40 % 256, 255 - number * 3 % 256, 128)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format=stream.pix_fmt
            )
            if slow_from is not None:
                frame.pts = number + 9 * max(0, number - slow_from)
                frame.time_base = step
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def trimmed(data: bytes, frames: int) -> bytes:
    """The clip without its first `frames`, cut without re-encoding: an edit list hides them, the
    file keeps them.
    """
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.pts -= frames * packet.duration
                packet.dts -= frames * packet.duration
                packet.stream = stream
                target.mux(packet)
    return buffer.getvalue()


def video_part(data: bytes, mime: str = "video/mp4") -> dict:
    return {"type": "video_url", "video_url": {"url": data_url(data, mime)}}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}
