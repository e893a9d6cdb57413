"""Draws clips with questions and answers: an event of a few frames, or a text that never changes.

Both kinds show moving shapes and, in half the clips, a flickering rectangle, so that more changes
from frame to frame than EVS can keep. An event competes with those changes and may be pruned. A
text that is there from the first frame is never pruned, because EVS keeps the first frame whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from calibrate.sources.synthetic.drawing import (
    COLORS,
    FACES,
    Color,
    Lettering,
    Page,
    draw_shape,
    text_width,
)
from calibrate.sources.synthetic.scenes import Picture, Scene, as_color, code, finished

SIDE = 256
"""Pixels per side of a frame: one tile of the tiny checkpoint."""
FPS = 2
LENGTHS = (4, 6, 8, 12, 16)
"""Numbers of frames that clips have."""
_LENGTH_SHARES = (0.30, 0.28, 0.24, 0.10, 0.08)


def video_event(random: np.random.RandomState, frames: int | None = None) -> Scene:
    """Draw a clip in which a coloured box with a digit is shown for one to three frames.

    The box is never in the first frame. Questions are about the digit and about the colour.

    Args:
        random: Random generator.
        frames: Number of frames; drawn from `LENGTHS` if not given.
    """
    pages = _background(random, frames)
    length = int(random.randint(1, 4))
    start = int(random.randint(1, max(2, len(pages) - length + 1)))
    color = str(random.choice(list(COLORS)))
    digit = str(random.randint(10))
    size = int(random.randint(28, 41))
    face = int(random.randint(len(FACES)))
    side = 1.35 * size
    x, y = random.uniform(2, SIDE - side - 2, 2)
    ink = _readable_ink(COLORS[color])
    text_left = x + (side - text_width(digit, size, face)) / 2
    for page in pages[start : start + length]:
        page.shape("square", (x, y, x + side, y + side), color)
        page.text(text_left, y + side / 2, digit, size, ink, face, word=True, link=color)
    about_digit = ("Which digit appears?", digit)
    about_color = ("What color is the digit's box?", color)
    if random.rand() < 0.6:
        first, second = about_digit, about_color
    else:
        first, second = about_color, about_digit
    question, answer = first
    return Scene(question, answer, _finished_frames(pages), moving=True, more=(second,))


def video_static(random: np.random.RandomState, frames: int | None = None) -> Scene:
    """Draw a clip that shows a code of four characters on a plate that never moves.

    Args:
        random: Random generator.
        frames: Number of frames; drawn from `LENGTHS` if not given.
    """
    pages = _background(random, frames)
    answer = code(random, 4, 4)
    size = int(random.randint(26, 33))
    face = int(random.randint(len(FACES)))
    lettering = Lettering(size, size * random.uniform(0.95, 1.1), face)
    width = 4 * lettering.pitch
    height = 1.5 * size
    x = random.uniform(4, SIDE - width - 4)
    y = random.uniform(4, SIDE - height - 4)
    for page in pages:
        page.pen.rectangle((x, y, x + width, y + height), fill=(245, 245, 240))
        page.spaced(x, y + height / 2, answer, (15, 15, 25), lettering)
    return Scene("What is the code in the video?", answer, _finished_frames(pages), moving=True)


def _finished_frames(pages: list[Page]) -> tuple[Picture, ...]:
    return tuple(finished(page) for page in pages)


def _readable_ink(paper: Color) -> Color:
    is_light = sum(paper) > 330
    return (10, 10, 10) if is_light else (250, 250, 250)


@dataclass(frozen=True)
class _Mover:
    """A shape that moves on a straight path and is reflected at the edges of the frame.

    Attributes:
        shape: Of `calibrate.sources.synthetic.drawing.SHAPES`.
        color: Its colour.
        radius: Half its width in pixels.
        position: Its centre in the first frame: float [2], x and y in pixels.
        speed: Pixels per frame: float [2].
    """

    shape: str
    color: Color
    radius: float
    position: np.ndarray
    speed: np.ndarray

    def draw(self, page: Page, frame: int) -> None:
        # The straight path is folded back into the frame.
        straight = self.position + frame * self.speed
        x, y = np.abs((straight + SIDE) % (2 * SIDE) - SIDE)
        box = (x - self.radius, y - self.radius, x + self.radius, y + self.radius)
        draw_shape(page.pen, self.shape, box, self.color)


def _movers(random: np.random.RandomState) -> list[_Mover]:
    count = int(random.randint(0, 7))
    positions = random.uniform(0, SIDE, (count, 2))
    speeds = random.uniform(-28, 28, (count, 2))
    radii = random.uniform(8, 28, count)
    colors = random.randint(40, 215, (count, 3))
    shapes = random.choice(["circle", "triangle", "star"], count)
    movers = []
    for number in range(count):
        mover = _Mover(
            shape=str(shapes[number]),
            color=as_color(colors[number]),
            radius=radii[number],
            position=positions[number],
            speed=speeds[number],
        )
        movers.append(mover)
    return movers


def _background(random: np.random.RandomState, frames: int | None) -> list[Page]:
    """Draw frames with a still gradient, up to six moving shapes and, in half the clips, a
    rectangle of blocks that flickers.
    """
    if frames is None:
        frames = int(random.choice(LENGTHS, p=_LENGTH_SHARES))
    corners = random.randint(60, 180, (2, 2, 3)).astype(np.uint8)
    gradient = Image.fromarray(corners).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    movers = _movers(random)
    flickers = random.rand() < 0.5
    # The rectangle is drawn even for clips without flicker, to keep the order of random numbers.
    size = random.uniform(0.3, 1.0, 2) * SIDE
    corner = random.uniform(0, 1, 2) * (SIDE - size)
    width, height = size.astype(int).tolist()
    left, top = corner.astype(int).tolist()
    pages = []
    for frame in range(frames):
        page = Page(gradient.copy())
        if flickers:
            block_rows = height // 16 + 1
            block_columns = width // 16 + 1
            colors = random.randint(30, 226, (block_rows, block_columns, 3)).astype(np.uint8)
            blocks = Image.fromarray(colors).resize((width, height), Image.Resampling.NEAREST)
            page.image.paste(blocks, (left, top))
        for mover in movers:
            mover.draw(page, frame)
        pages.append(page)
    return pages
