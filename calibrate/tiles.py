"""Images and video frames to normalised tiles, as vLLM's processor for `NemotronH_Nano_VL_V2` makes
them.

Facts from vLLM 0.32: vllm/transformers_utils/processors/{nano_nemotron_vl,internvl}.py and
vllm/multimodal/image.py.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from checkpoint.config import CheckpointConfig
from checkpoint.faults import BadInput, Fault

MAX_TILES = 12
# vLLM's VLLM_MAX_IMAGE_PIXELS: a server refuses larger pictures and frames.
MAX_PIXELS = 178_956_970
# Readers that run other programs on the file, or cannot decode; vLLM denies them too.
_DENIED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
# Frames resized at once. Float32 frames are eight times their decoded bytes; 128 of a large video
# would not fit.
_FRAMES_AT_ONCE = 8


def load_image(data: bytes, where: str) -> Image.Image:
    """Decode an image file to RGB: upright by its EXIF orientation, transparency laid on white,
    first frame only.

    Raises:
        BadInput: It is no image, it is cut off, or it has more than `MAX_PIXELS`; `where` names the
            sample.
    """
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides
            image: Image.Image = Image.open(
                io.BytesIO(data), formats=[name for name in Image.OPEN if name not in _DENIED]
            )
        if image.width * image.height > MAX_PIXELS:
            what = f"at most {MAX_PIXELS} pixels are served, the image has {image.width}x{image.height}"
            raise BadInput(Fault(where, what, "make it smaller"))
        image.load()
    except BadInput:
        raise
    except (
        Image.DecompressionBombError
    ) as error:  # Pillow's own limit, the same number, comes first
        raise BadInput(
            Fault(where, f"at most {MAX_PIXELS} pixels are served: {error}", "make it smaller")
        ) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise BadInput(
            Fault(where, f"image cannot be read: {error}", "give PNG, JPEG or WebP")
        ) from None
    with contextlib.suppress(Exception):  # an unreadable EXIF block is ignored, as in serving
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        flat = Image.new("RGB", layer.size, (255, 255, 255))
        flat.paste(layer, mask=layer.getchannel("A"))
        return flat
    return image.convert("RGB")


def tile_grid(width: int, height: int, size: int, limit: int = MAX_TILES) -> tuple[int, int]:
    """Return the (columns, rows) of tiles an image is cut into: the grid nearest to its aspect
    ratio.

    Of grids equally near, a larger one wins if the image has more than half its pixels.

    Args:
        width: Image width in pixels.
        height: Image height in pixels.
        size: Side of a tile in pixels.
        limit: Most tiles, the thumbnail not counted.
    """
    aspect, best, best_gap = width / height, (1, 1), math.inf
    for count in range(1, limit + 1):
        for cols in range(1, count + 1):
            if count % cols:
                continue
            rows = count // cols
            gap = abs(aspect - cols / rows)
            if gap < best_gap or (gap == best_gap and width * height > 0.5 * size * size * count):
                best, best_gap = (cols, rows), gap
    return best


def image_tiles(image: Image.Image, config: CheckpointConfig) -> torch.Tensor:
    """Return the tiles of an RGB image, row by row, the thumbnail last when there is more than one.

    Returns:
        Float32 [tiles, 3, size, size], normalised by the config's `norm_mean` and `norm_std`.
    """
    size = config.tile_size
    cols, rows = tile_grid(*image.size, size)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))[None]
    whole = _normalised(pixels, rows * size, cols * size, config)
    tiles = (
        whole.reshape(3, rows, size, cols, size)
        .permute(1, 3, 0, 2, 4)
        .reshape(rows * cols, 3, size, size)
    )
    if config.raw["use_thumbnail"] and len(tiles) > 1:
        tiles = torch.cat([tiles, _normalised(pixels, size, size, config)])
    return tiles


def frame_tiles(frames: NDArray[np.uint8], config: CheckpointConfig) -> torch.Tensor:
    """Return one tile a frame: the whole frame resized to a square, whatever its shape.

    Args:
        frames: uint8 [frames, height, width, 3].
        config: The checkpoint's.

    Returns:
        Float32 [frames, 3, size, size], normalised.
    """
    size = config.tile_size
    parts = [
        _normalised(torch.from_numpy(frames[start : start + _FRAMES_AT_ONCE]), size, size, config)
        for start in range(0, len(frames), _FRAMES_AT_ONCE)
    ]
    return torch.cat(parts)


def _normalised(
    pixels: torch.Tensor, height: int, width: int, config: CheckpointConfig
) -> torch.Tensor:
    """Resize uint8 [N, H, W, 3] to float32 [N, 3, height, width] and normalise."""
    values = pixels.permute(0, 3, 1, 2).to(torch.float32)
    if values.shape[-2:] != (height, width):
        values = torch.nn.functional.interpolate(
            values, size=(height, width), mode="bicubic", align_corners=False, antialias=True
        )
    mean, deviation = (
        torch.tensor(config.raw[key]).reshape(1, 3, 1, 1) for key in ("norm_mean", "norm_std")
    )
    # Bicubic overshoots beyond 0..255 and vLLM does not clamp.
    return ((values / 255.0 - mean) / deviation).contiguous()
