"""Draws what EVS keeps of a clip: the sampled frames in a grid, dropped patches dimmed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from calibrate.forward import embed
from calibrate.prompts import build_prompt
from calibrate.samples import Sample
from calibrate.sources.synthetic.drawing import data_url, font
from calibrate.video import decode
from checkpoint.atomic import replaced_file
from checkpoint.faults import BadInput, Fault
from checkpoint.native import load_model
from checkpoint.opened import Checkpoint
from checkpoint.video import Video

QUESTION = "\nWhat happens in the clip?"
"""The question that the prompt's length includes."""

CELL_WIDTH = 192
LABEL_HEIGHT = 22
HEADER_HEIGHT = 58
GAP = 6
_FACE = 1
_INK = (30, 30, 30)
_DIM_SHARE = 0.25
_DIM_GREY = 60.0
_MOST_PIXELS = 178_956_970
"""Of a sheet: what Pillow, and so a model's server, refuses to read."""
_COLORS = 256
"""Colours of the file: more would make it several times as large."""


@dataclass(frozen=True)
class Kept:
    """What EVS keeps of a clip.

    Attributes:
        name: The clip's file name.
        video: How it was sampled and pruned.
        frames: The sampled frames, uint8 [frames, side, side, 3], as the model sees them.
        seconds: The time stamp of each frame, as in the prompt.
        mask: Which patches remain, bool [frames, rows, columns].
        width: Of a frame of the file in pixels.
        height: Of a frame of the file.
        prompt_tokens: Tokens of a prompt with the clip and a short question, after EVS.
        unpruned_tokens: The same without EVS.
    """

    name: str
    video: Video
    frames: NDArray[np.uint8]
    seconds: tuple[float, ...]
    mask: NDArray[np.bool_]
    width: int
    height: int
    prompt_tokens: int
    unpruned_tokens: int

    @property
    def counts(self) -> list[int]:
        """Patches that remain of each frame."""
        return [int(frame.sum()) for frame in self.mask]

    def budget(self) -> str:
        """What the clip costs, in a line."""
        kept = int(self.mask.sum())
        visual = f"{kept:,} of {self.mask.size:,} visual tokens kept"
        prompt = f"prompt with a short question {self.prompt_tokens:,} tokens"
        return f"{visual}; {prompt}, {self.unpruned_tokens:,} without EVS"


@torch.no_grad()
def prune_clip(
    data: bytes, name: str, checkpoint: Checkpoint, video: Video, columns: int | None = None
) -> Kept:
    """Prune a clip with a checkpoint's own vision tower, as calibration and serving do.

    The tower and the projector run, the layers of the language model are not loaded.

    Args:
        data: The file.
        name: Names the clip.
        checkpoint: An opened directory, BF16 or quantized: the tower is never quantized.
        video: How the clip is sampled and pruned.
        columns: As in `draw_sheet`.

    Raises:
        BadInput: The clip cannot be decoded, the sheet would be too large, or tensors of the tower
            are missing.
    """
    config = checkpoint.config
    clip = decode(data, name, video, config.tile_size)
    # One frame in its own size says which shape the squares of the model had.
    height, width = decode(data, name, Video(max_frames=1), None).frames.shape[1:3]
    count = len(clip.frames)
    layout = sheet_layout(count, height, width, columns)
    if layout.width * layout.height > _MOST_PIXELS:
        what = f"a sheet of {count} frames would have {layout.width} x {layout.height} pixels"
        raise BadInput(Fault(name, what, "lower --max-frames or --columns"))
    part = {"type": "video_url", "video_url": {"url": data_url("video/mp4", data)}}
    content = [part, {"type": "text", "text": QUESTION}]
    sample = Sample(name, [{"role": "user", "content": content}], name)
    prompt = build_prompt(sample, config, checkpoint.tokenizer, video)
    model = load_model(checkpoint, layers=False)
    embedded = embed(model, prompt, config)
    (media,) = prompt.media
    side = math.isqrt(config.tokens_per_tile)
    of_frames = [embedded.kept[run.start : run.end].reshape(side, side) for run in media.visual]
    return Kept(
        name=name,
        video=video,
        frames=clip.frames,
        seconds=tuple(index * clip.frame_duration_ms / 1000 for index in clip.indices),
        mask=torch.stack(of_frames).numpy(),
        width=width,
        height=height,
        prompt_tokens=len(embedded.token_ids),
        unpruned_tokens=len(prompt.token_ids),
    )


class SheetLayout(NamedTuple):
    """How a sheet is laid out; sizes in pixels."""

    width: int
    height: int
    columns: int
    cell_height: int


def sheet_layout(
    count: int, frame_height: int, frame_width: int, columns: int | None = None
) -> SheetLayout:
    """Lay out a sheet.

    Args:
        count: Number of frames.
        frame_height: Of a frame of the file in pixels.
        frame_width: Of a frame of the file.
        columns: Frames in a row; chosen by their number when None.
    """
    columns = min(count, columns or max(4, math.ceil(math.sqrt(1.25 * count))))
    rows = math.ceil(count / columns)
    cell_height = max(1, round(CELL_WIDTH * frame_height / frame_width))
    step_x = CELL_WIDTH + GAP
    step_y = cell_height + LABEL_HEIGHT + GAP
    # The header needs some width even where there are few frames.
    width = max(columns * step_x + GAP, 4 * step_x)
    return SheetLayout(width, HEADER_HEIGHT + rows * step_y, columns, cell_height)


def draw_sheet(kept: Kept, columns: int | None = None) -> Image.Image:
    """Draw the frames in rows, each with its time stamp and the number of its kept patches.

    Args:
        kept: From `prune_clip`.
        columns: Frames in a row; chosen by their number when None.
    """
    count = len(kept.frames)
    layout = sheet_layout(count, kept.height, kept.width, columns)
    cell_height = layout.cell_height
    step_x = CELL_WIDTH + GAP
    step_y = cell_height + LABEL_HEIGHT + GAP
    sheet = Image.new("RGB", (layout.width, layout.height), "white")
    pen = ImageDraw.Draw(sheet)
    title = f"{kept.name}: {count} frames, EVS rate {kept.video.pruning_rate:g}"
    pen.text((GAP, 8), title, fill=_INK, font=font(17, _FACE))
    pen.text((GAP, 32), kept.budget(), fill=_INK, font=font(14, _FACE))
    patches = kept.mask[0].size
    for number, frame in enumerate(kept.frames):
        row, column = divmod(number, layout.columns)
        left = GAP + column * step_x
        top = HEADER_HEIGHT + row * step_y
        picture = Image.fromarray(dimmed(frame, kept.mask[number]))
        sheet.paste(picture.resize((CELL_WIDTH, cell_height)), (left, top))
        label = f"{kept.seconds[number]:.2f} s · {kept.counts[number]} of {patches}"
        pen.text((left, top + cell_height + 3), label, fill=_INK, font=font(13, _FACE))
    return sheet


def dimmed(frame: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return a frame whose dropped patches are dark and grey.

    Args:
        frame: uint8 [side, side, 3].
        mask: Which patches remain, bool [rows, columns]; they divide the sides.
    """
    height, width = frame.shape[:2]
    rows, columns = mask.shape
    kept = mask.repeat(height // rows, axis=0).repeat(width // columns, axis=1)
    grey = frame.mean(axis=2, keepdims=True)
    dark = _DIM_SHARE * grey + (1 - _DIM_SHARE) * _DIM_GREY
    pixels = np.where(kept[..., None], frame, dark)
    return pixels.astype(np.uint8)


def write_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a PNG of few colours."""
    few = sheet.quantize(_COLORS, dither=Image.Dither.NONE)
    with replaced_file(path) as partial:
        few.save(partial, format="PNG", optimize=True)
