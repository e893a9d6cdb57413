"""Labels of image patches: which glyph has its centre in a patch. Training names them from visual
tokens.
"""

from __future__ import annotations

import string

import numpy as np

from calibrate.sources.synthetic.drawing import BAR_END, COLORS, SHAPES, Mark
from calibrate.sources.synthetic.scenes import Picture

PATCH = 16
"""Pixels per side of a patch of the vision tower."""
CHARACTERS = string.ascii_uppercase + string.digits
NAMES = (*CHARACTERS, *SHAPES, *COLORS)
"""Names whose embeddings visual tokens are trained to resemble; the colours are last."""

# A patch has three labels: its glyph, the position of the glyph in its word, and its link.
EMPTY = 0
RUNNING_TEXT = 1
IGNORED = 255
"""Glyph label of patches without a loss."""
_GLYPHS = [*CHARACTERS, *SHAPES, BAR_END]
_LINKS = [*string.ascii_uppercase, *COLORS]
GLYPH_CLASSES = {name: number for number, name in enumerate(_GLYPHS, RUNNING_TEXT + 1)}
LINK_CLASSES = {name: number for number, name in enumerate(_LINKS, 1)}
LABEL_SIZES = (len(_GLYPHS) + 2, 8, len(_LINKS) + 1)
"""Number of classes of each of the three labels."""


def patch_labels(picture: Picture, rows: int, cols: int) -> np.ndarray:
    """Return the labels of the patches that a picture is divided into.

    Args:
        picture: The picture and its marks.
        rows: Patches from top to bottom.
        cols: Patches from left to right.

    Returns:
        uint8 [rows, cols, 3]: glyph, position in its word and link of each patch.
    """
    labels = np.zeros((rows, cols, 3), np.uint8)
    height, width = picture.pixels.shape[:2]
    scale = PATCH * min(rows / height, cols / width)
    is_too_small_to_read = scale < 0.75
    for mark in picture.marks:
        row = min(rows - 1, max(0, int(mark.y / height * rows)))
        col = min(cols - 1, max(0, int(mark.x / width * cols)))
        labels[row, col] = _label(mark, is_too_small_to_read)
    return labels


def _label(mark: Mark, is_too_small_to_read: bool) -> tuple[int, int, int]:
    is_shape = mark.name in SHAPES
    if is_too_small_to_read and not is_shape:
        return RUNNING_TEXT, 0, 0
    if is_shape or mark.index > 0:
        return GLYPH_CLASSES[mark.name], mark.index, LINK_CLASSES.get(mark.link, 0)
    if mark.name.islower():
        return RUNNING_TEXT, 0, 0
    # A capital letter or digit of running text. It looks like one of a code, so it gets no loss.
    return IGNORED, IGNORED, IGNORED
