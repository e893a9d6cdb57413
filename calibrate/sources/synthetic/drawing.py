"""Draws on pages and frames from an explicit seed, and turns them into PNG, MP4 and data URLs.

The typefaces are Pillow's own and those of three packages, so a page looks the same on every
machine.
"""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

import font_roboto
import font_source_sans_pro
import font_source_serif_pro
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]

# Colours that stay apart under 4:2:0 chroma and 16-pixel patches; each has a name of one token.
COLORS: dict[str, Color] = {
    "red": (215, 35, 40),
    "green": (40, 160, 60),
    "blue": (40, 75, 210),
    "yellow": (240, 210, 40),
    "purple": (130, 45, 165),
    "orange": (240, 130, 25),
    "pink": (245, 150, 190),
    "cyan": (60, 200, 215),
}
BAR_END = "bar end"
SHAPES = ("circle", "square", "triangle", "star", "cross")
# Pillow's own, two without serifs and one with; all but the first also bold.
FACES = (
    None,
    font_roboto.Roboto,
    font_roboto.RobotoBold,
    font_source_sans_pro.SourceSansPro,
    font_source_sans_pro.SourceSansProBold,
    font_source_serif_pro.SourceSerifPro,
    font_source_serif_pro.SourceSerifProBold,
)
# Without I, O, 0 and 1, which typefaces draw too much alike.
CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"


def stream(*parts: str | int) -> np.random.RandomState:
    """A random stream of its own for `parts`. RandomState's streams are frozen by NumPy's policy."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


@lru_cache(maxsize=512)
def font(size: int, face: int = 0) -> Any:
    """A typeface of `FACES` at `size` pixels."""
    path = FACES[face]
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


@dataclass(frozen=True)
class Mark:
    """Where one glyph or shape stands: what training can supervise densely, tile by tile.

    Attributes:
        name: The character, or the shape's name.
        x: Centre, in pixels of the page.
        y: Centre, in pixels of the page.
        index: Place in its word, from 1; 0 for running text.
        link: What it belongs to: the label of a bar's value, the colour of a shape; empty when
            nothing.
    """

    name: str
    x: float
    y: float
    index: int = 0
    link: str = ""


@dataclass
class Page:
    """An RGB page under a pen, and the marks of what was drawn on it."""

    image: Image.Image
    marks: list[Mark] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pen = ImageDraw.Draw(self.image)

    @property
    def pixels(self) -> np.ndarray:
        """The page as uint8 [height, width, 3]."""
        return np.asarray(self.image)

    def text(
        self,
        x: float,
        y: float,
        string: str,
        size: int,
        ink: Color,
        face: int = 0,
        word: bool = False,
        link: str = "",
    ) -> None:
        """Write `string` with its left end at `x`, centred on the line `y`.

        Args:
            x: Left end in pixels.
            y: Middle of the capitals in pixels.
            string: What to write.
            size: Font size in pixels.
            ink: Colour.
            face: Place in `FACES`.
            word: Mark its characters as a word to be read (codes, values, labels), numbered from 1.
            link: What the word belongs to.
        """
        self.pen.text(
            (x, y + CAP_HEIGHT * size / 2), string, font=font(size, face), fill=ink, anchor="ls"
        )
        place = 0
        for character in string:
            width = _advance(character, size, face)
            if character != " ":
                place += 1
                self.marks.append(Mark(character, x + width / 2, y, place if word else 0, link))
            x += width

    def spaced(
        self,
        x: float,
        y: float,
        string: str,
        size: int,
        ink: Color,
        pitch: float,
        face: int = 0,
        link: str = "",
    ) -> None:
        """Write a word to be read, each character in the middle of a cell `pitch` pixels wide.

        Args:
            x: Left end of the first cell in pixels.
            y: Middle of the capitals in pixels.
            string: What to write.
            size: Font size in pixels.
            ink: Colour.
            pitch: Width of a cell in pixels.
            face: Place in `FACES`.
            link: What the word belongs to.
        """
        for place, character in enumerate(string):
            middle = x + (place + 0.5) * pitch
            at = (middle, y + CAP_HEIGHT * size / 2)
            self.pen.text(at, character, font=font(size, face), fill=ink, anchor="ms")
            self.marks.append(Mark(character, middle, y, place + 1, link))

    def shape(self, name: str, box: Box, color: str) -> None:
        """Draw one of `SHAPES` in `box` (left, top, right, bottom) in one of `COLORS`."""
        left, top, right, bottom = box
        draw_shape(self.pen, name, box, COLORS[color])
        self.marks.append(Mark(name, (left + right) / 2, (top + bottom) / 2, 0, color))

    def bar(self, box: Box, ink: Color, link: str) -> None:
        """Draw a horizontal bar; its right end is marked, since that is what is read."""
        _, top, right, bottom = box
        self.pen.rectangle(box, fill=ink)
        self.marks.append(Mark(BAR_END, right, (top + bottom) / 2, 1, link))


# Height of a capital, as a share of the font size, in all of `FACES` to a few hundredths.
CAP_HEIGHT = 0.7


@lru_cache(maxsize=8192)
def _advance(character: str, size: int, face: int) -> float:
    return font(size, face).getlength(character)


def text_width(string: str, size: int, face: int = 0) -> float:
    """Width in pixels, kerning left out: asking FreeType for whole strings took most of a page's
    time.
    """
    return sum(_advance(character, size, face) for character in string)


def blank(width: int, height: int, paper: Color) -> Page:
    """An empty page."""
    return Page(Image.new("RGB", (width, height), paper))


def draw_shape(pen: ImageDraw.ImageDraw, name: str, box: Box, ink: Color) -> None:
    """Fill one of `SHAPES`; raises `KeyError` for another name."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    if name == "circle":
        pen.ellipse(box, fill=ink)
    elif name == "square":
        pen.rectangle(box, fill=ink)
    else:
        pen.polygon(
            [(left + px * width, top + py * height) for px, py in _OUTLINES[name]], fill=ink
        )


def _star() -> list[tuple[float, float]]:
    angles = [np.pi * (step / 5 - 0.5) for step in range(10)]
    radii = [0.5 if step % 2 == 0 else 0.2 for step in range(10)]
    return [
        (0.5 + r * float(np.cos(a)), 0.5 + r * float(np.sin(a)))
        for a, r in zip(angles, radii, strict=True)
    ]


_OUTLINES = {
    "triangle": [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)],
    "star": _star(),
    "cross": [(x / 3, y / 3) for x, y in
              ((1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1))],
}  # fmt: skip


def png_bytes(pixels: np.ndarray) -> bytes:
    """Encode uint8 [height, width, 3] as PNG."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", compress_level=1)
    return out.getvalue()


def mp4_bytes(frames: np.ndarray, fps: int = 2, crf: int = 20) -> bytes:
    """Encode uint8 [T, height, width, 3] as MP4 (H.264, 4:2:0), the same bytes at every call.

    Args:
        frames: The frames; height and width even.
        fps: Frames a second.
        crf: x264's quality, 0 lossless to 51.
    """
    import av

    out = io.BytesIO()
    # One thread and the bit-exact muxer: x264's slices and the file's encoder tag would differ
    # between machines.
    with av.open(out, mode="w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream(
            "libx264", rate=Fraction(fps), options={"crf": str(crf), "preset": "veryfast"}
        )
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.thread_count = 1
        video.codec_context.flags |= av.codec.context.Flags.bitexact
        for pixels in frames:
            container.mux(
                video.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                )
            )
        container.mux(video.encode())
    return out.getvalue()


def data_url(media_type: str, content: bytes) -> str:
    """`data:…;base64,…`, as an OpenAI message carries it."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
