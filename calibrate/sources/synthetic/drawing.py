"""Draws text and shapes on RGB pages, and encodes pages as PNG, MP4 and data URLs.

The typefaces are Pillow's default and those of three font packages, never those of the system, so
a page has the same pixels on every machine.
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

# Colours that remain distinct after 4:2:0 chroma subsampling and in patches of 16 pixels. The name
# of each is one token of the tiny tokenizer.
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
SHAPES = ("circle", "square", "triangle", "star", "cross")
BAR_END = "bar end"
"""Name of the mark at the right end of a chart's bar."""
# Pillow's default typeface, two sans serif ones and a serif one, each of the three also in bold.
FACES = (
    None,
    font_roboto.Roboto,
    font_roboto.RobotoBold,
    font_source_sans_pro.SourceSansPro,
    font_source_sans_pro.SourceSansProBold,
    font_source_serif_pro.SourceSerifPro,
    font_source_serif_pro.SourceSerifProBold,
)
# Without I, O, 0 and 1, which look too similar to each other in some typefaces.
CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
CAP_HEIGHT = 0.7
"""Height of a capital letter as a share of the font size, to a few hundredths in all `FACES`."""


def random_state(*parts: str | int) -> np.random.RandomState:
    """Return a random generator that is seeded by `parts`, such as a kind, a seed and an index.

    NumPy guarantees that the numbers of `RandomState` never change, so items drawn from it are the
    same with every version of NumPy.
    """
    name = "\x1f".join(str(part) for part in parts)
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


@lru_cache(maxsize=512)
def font(size: int, face: int = 0) -> Any:
    """Return the font of a typeface at `size` pixels; `face` is its index in `FACES`."""
    path = FACES[face]
    if path is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(path, size)


@dataclass(frozen=True)
class Mark:
    """The position of one drawn glyph or shape. Training uses marks as labels of image patches.

    Attributes:
        name: The character, the name of the shape, or `BAR_END`.
        x: Centre, in pixels of the page.
        y: Centre, in pixels of the page.
        index: Position in its word, from 1; 0 for running text and shapes.
        link: What it belongs to: the label of a row or bar, or the colour of a shape; empty for
            nothing.
    """

    name: str
    x: float
    y: float
    index: int = 0
    link: str = ""


@dataclass(frozen=True)
class Lettering:
    """How a word that is to be read is written, one character per cell.

    Attributes:
        size: Font size in pixels.
        pitch: Width of a cell in pixels.
        face: Index in `FACES`.
    """

    size: int
    pitch: float
    face: int


@dataclass
class Page:
    """An RGB image, and the marks of what was drawn on it."""

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
        """Write `string` with its left end at `x`, vertically centred on `y`.

        Args:
            x: Left end in pixels.
            y: Middle of the capital letters in pixels.
            string: What to write.
            size: Font size in pixels.
            ink: Colour.
            face: Index in `FACES`.
            word: Number the marks of its characters from 1, as a word that is to be read (a code, a
                value or a label); otherwise they get index 0, as running text.
            link: What the word belongs to.
        """
        baseline = y + CAP_HEIGHT * size / 2
        self.pen.text((x, baseline), string, font=font(size, face), fill=ink, anchor="ls")
        place = 0
        for character in string:
            width = _advance(character, size, face)
            if character != " ":
                place += 1
                index = place if word else 0
                self.marks.append(Mark(character, x + width / 2, y, index, link))
            x += width

    def spaced(
        self,
        x: float,
        y: float,
        string: str,
        ink: Color,
        lettering: Lettering,
        link: str = "",
    ) -> None:
        """Write a word that is to be read, each character in the middle of its own cell.

        Args:
            x: Left end of the first cell in pixels.
            y: Middle of the capital letters in pixels.
            string: What to write.
            ink: Colour.
            lettering: Font size, width of a cell and typeface.
            link: What the word belongs to.
        """
        baseline = y + CAP_HEIGHT * lettering.size / 2
        typeface = font(lettering.size, lettering.face)
        for place, character in enumerate(string):
            middle = x + (place + 0.5) * lettering.pitch
            self.pen.text((middle, baseline), character, font=typeface, fill=ink, anchor="ms")
            self.marks.append(Mark(character, middle, y, place + 1, link))

    def shape(self, name: str, box: Box, color: str) -> None:
        """Draw one of `SHAPES` in `box` (left, top, right, bottom) in one of `COLORS`."""
        left, top, right, bottom = box
        draw_shape(self.pen, name, box, COLORS[color])
        self.marks.append(Mark(name, (left + right) / 2, (top + bottom) / 2, 0, color))

    def bar(self, box: Box, ink: Color, link: str) -> None:
        """Draw a horizontal bar in `box` and mark its right end, which shows the bar's value."""
        _, top, right, bottom = box
        self.pen.rectangle(box, fill=ink)
        self.marks.append(Mark(BAR_END, right, (top + bottom) / 2, 1, link))


@lru_cache(maxsize=8192)
def _advance(character: str, size: int, face: int) -> float:
    return font(size, face).getlength(character)


def text_width(string: str, size: int, face: int = 0) -> float:
    """Return the width of a text in pixels, without kerning.

    The cached widths of single characters are summed, because measuring whole strings with FreeType
    took most of the time of a page.
    """
    return sum(_advance(character, size, face) for character in string)


def blank(width: int, height: int, paper: Color) -> Page:
    """Return an empty page of `width` x `height` pixels."""
    return Page(Image.new("RGB", (width, height), paper))


def draw_shape(pen: ImageDraw.ImageDraw, name: str, box: Box, ink: Color) -> None:
    """Draw a filled shape.

    Args:
        pen: Draws on the image.
        name: One of `SHAPES`.
        box: Left, top, right and bottom in pixels.
        ink: Colour.

    Raises:
        KeyError: If `name` is not one of `SHAPES`.
    """
    left, top, right, bottom = box
    if name == "circle":
        pen.ellipse(box, fill=ink)
    elif name == "square":
        pen.rectangle(box, fill=ink)
    else:
        width = right - left
        height = bottom - top
        corners = [(left + x * width, top + y * height) for x, y in _OUTLINES[name]]
        pen.polygon(corners, fill=ink)


def _star() -> list[tuple[float, float]]:
    """Return the ten corners of a star in a box of width 1, outer and inner ones in turn."""
    corners = []
    for step in range(10):
        angle = np.pi * (step / 5 - 0.5)
        radius = 0.5 if step % 2 == 0 else 0.2
        x = 0.5 + radius * float(np.cos(angle))
        y = 0.5 + radius * float(np.sin(angle))
        corners.append((x, y))
    return corners


# Corners of the shapes that are polygons, in a box of width and height 1.
_OUTLINES = {
    "triangle": [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)],
    "star": _star(),
    "cross": [
        (1 / 3, 0.0),
        (2 / 3, 0.0),
        (2 / 3, 1 / 3),
        (1.0, 1 / 3),
        (1.0, 2 / 3),
        (2 / 3, 2 / 3),
        (2 / 3, 1.0),
        (1 / 3, 1.0),
        (1 / 3, 2 / 3),
        (0.0, 2 / 3),
        (0.0, 1 / 3),
        (1 / 3, 1 / 3),
    ],
}


def png_bytes(pixels: np.ndarray) -> bytes:
    """Return uint8 pixels [height, width, 3] encoded as PNG."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", compress_level=1)
    return out.getvalue()


def mp4_bytes(frames: np.ndarray, fps: int = 2, crf: int = 20) -> bytes:
    """Return frames encoded as MP4 (H.264, 4:2:0); the same frames give the same bytes.

    Args:
        frames: uint8 [frames, height, width, 3]; height and width are even.
        fps: Frames per second.
        crf: Quality setting of x264, from 0 (lossless) to 51.
    """
    import av

    out = io.BytesIO()
    # One thread and the bit-exact muxer and encoder: otherwise the number of x264's slices and the
    # encoder tag in the file differ between machines.
    with av.open(out, mode="w", format="mp4", options={"fflags": "+bitexact"}) as container:
        quality = {"crf": str(crf), "preset": "veryfast"}
        video = container.add_stream("libx264", rate=Fraction(fps), options=quality)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.thread_count = 1
        video.codec_context.flags |= av.codec.context.Flags.bitexact
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
    return out.getvalue()


def data_url(media_type: str, content: bytes) -> str:
    """Return a `data:…;base64,…` URL, as OpenAI chat messages carry images and video."""
    encoded = base64.b64encode(content).decode("ascii")
    return f"data:{media_type};base64,{encoded}"
