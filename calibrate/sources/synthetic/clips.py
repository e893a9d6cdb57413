"""Clips with a question and its answer: something that happens for a few frames, or a text that
never changes.

Both carry moving discs and a flickering field, so that EVS has more change to keep than it has
budget for: an event is pruned where other changes compete, a text of the first frame never is (EVS
keeps that frame whole).
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from calibrate.sources.synthetic.drawing import COLORS, FACES, Color, Page, draw_shape, text_width
from calibrate.sources.synthetic.scenes import Scene, code, finished

SIDE = 256
"""Pixels of a clip's frame: one tile of the tiny checkpoint."""
FPS = 2
LENGTHS = (4, 6, 8, 12, 16)
_LENGTH_SHARES = (0.30, 0.28, 0.24, 0.10, 0.08)


def video_event(random: np.random.RandomState, frames: int | None = None) -> Scene:
    """A coloured box with a digit stands for one to three frames, early, in the middle or late;
    never in frame 1.
    """
    pages = _background(random, frames)
    length = int(random.randint(1, 4))
    start = int(random.randint(1, max(2, len(pages) - length + 1)))
    color, digit = str(random.choice(list(COLORS))), str(random.randint(10))
    size, face = int(random.randint(28, 41)), int(random.randint(len(FACES)))
    side = 1.35 * size
    x, y = random.uniform(2, SIDE - side - 2, 2)
    ink = _ink_on(COLORS[color])
    for page in pages[start : start + length]:
        page.shape("square", (x, y, x + side, y + side), color)
        left = x + (side - text_width(digit, size, face)) / 2
        page.text(left, y + side / 2, digit, size, ink, face, word=True, link=color)
    questions = [("Which digit appears?", digit), ("What color is the digit's box?", color)]
    first, second = questions if random.rand() < 0.6 else questions[::-1]
    return Scene(*first, tuple(finished(page) for page in pages), moving=True, more=(second,))


def video_static(random: np.random.RandomState, frames: int | None = None) -> Scene:
    """A code of four characters stands on a plate that never moves."""
    pages = _background(random, frames)
    answer = code(random, 4, 4)
    size, face = int(random.randint(26, 33)), int(random.randint(len(FACES)))
    pitch = size * random.uniform(0.95, 1.1)
    width = 4 * pitch
    x, y = random.uniform(4, SIDE - width - 4), random.uniform(4, SIDE - 1.5 * size - 4)
    for page in pages:
        page.pen.rectangle((x, y, x + width, y + 1.5 * size), fill=(245, 245, 240))
        page.spaced(x, y + 0.75 * size, answer, size, (15, 15, 25), pitch, face)
    return Scene(
        "What is the code in the video?",
        answer,
        tuple(finished(page) for page in pages),
        moving=True,
    )


def _ink_on(color: Color) -> Color:
    return (10, 10, 10) if sum(color) > 330 else (250, 250, 250)


def _background(random: np.random.RandomState, frames: int | None) -> list[Page]:
    """Frames with a still gradient, up to six discs that move, and in half the clips a field that
    flickers.
    """
    count = frames or int(random.choice(LENGTHS, p=_LENGTH_SHARES))
    corners = random.randint(60, 180, (2, 2, 3)).astype(np.uint8)
    still = Image.fromarray(corners).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    movers = int(random.randint(0, 7))
    position, speed = random.uniform(0, SIDE, (movers, 2)), random.uniform(-28, 28, (movers, 2))
    radius = random.uniform(8, 28, movers)
    colors = [tuple(int(v) for v in c) for c in random.randint(40, 215, (movers, 3))]
    kinds = random.choice(["circle", "triangle", "star"], movers)
    flickers = random.rand() < 0.5
    size = random.uniform(0.3, 1.0, 2) * SIDE
    corner = random.uniform(0, 1, 2) * (SIDE - size)
    left, top, width, height = (int(v) for v in (*corner, *size))
    pages = []
    for moment in range(count):
        page = Page(still.copy())
        if flickers:
            blocks = random.randint(30, 226, (height // 16 + 1, width // 16 + 1, 3)).astype(
                np.uint8
            )
            field = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
            page.image.paste(field, (left, top))
        pen: ImageDraw.ImageDraw = page.pen
        for mover in range(movers):
            # Reflected at the edges: the fold of a straight path.
            x, y = np.abs((position[mover] + moment * speed[mover] + SIDE) % (2 * SIDE) - SIDE)
            r = radius[mover]
            draw_shape(pen, str(kinds[mover]), (x - r, y - r, x + r, y + r), colors[mover])  # type: ignore[arg-type]
        pages.append(page)
    return pages
