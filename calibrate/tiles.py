"""Images and video frames to normalized tiles, as vLLM with the plug-in makes them.

Grids and tokens equal those of vLLM without the plug-in; its pixels are resized in float32 and not
clamped (tests/plugin has the distance).

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
from PIL import Image, ImageOps, UnidentifiedImageError

from checkpoint.config import CheckpointConfig
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.reading import deep_pixels_fault
from hybridquant_vllm.pixels import cut_tiles, resize_all

MAX_TILES = 12
MAX_PIXELS = 178_956_970
"""vLLM's VLLM_MAX_IMAGE_PIXELS: a server refuses larger images."""

_DENIED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
"""Readers that run other programs on the file, or cannot decode; vLLM denies them too."""

_SMALLER = "make it smaller"


def load_image(data: bytes, where: str) -> Image.Image:
    """Decode an image file to RGB.

    It is turned upright by its EXIF orientation; transparency is laid on white; of an animation
    the first frame is taken.

    Args:
        data: The file.
        where: Names the sample in faults.

    Raises:
        BadInput: It is not an image, it is truncated, it has more than `MAX_PIXELS` pixels, or more
            than 8 bits a channel, which a server clips to a white picture.
    """
    image = _open_image(data, where)
    deep = deep_pixels_fault(image.mode, where)
    if deep is not None:
        raise BadInput(deep)
    with contextlib.suppress(Exception):  # an unreadable EXIF block is ignored, as in serving
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def _open_image(data: bytes, where: str) -> Image.Image:
    Image.init()
    formats = [name for name in Image.OPEN if name not in _DENIED]
    try:
        with warnings.catch_warnings():
            # MAX_PIXELS decides.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
        if image.width * image.height > MAX_PIXELS:
            size = f"{image.width}x{image.height}"
            what = f"at most {MAX_PIXELS} pixels are served, the image has {size}"
            raise BadInput(Fault(where, what, _SMALLER))
        image.load()
    except BadInput:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, twice the same number
        what = f"at most {MAX_PIXELS} pixels are served: {error}"
        raise BadInput(Fault(where, what, _SMALLER)) from None
    except UnidentifiedImageError:  # its text is the address of the bytes in memory
        what = "image cannot be read: it is in no format of pictures"
        raise BadInput(Fault(where, what, "give PNG, JPEG or WebP")) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        what = f"image cannot be read: {shortened(error)}"
        raise BadInput(Fault(where, what, "give PNG, JPEG or WebP")) from None
    return image


def _on_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    flat = Image.new("RGB", layer.size, (255, 255, 255))
    flat.paste(layer, mask=layer.getchannel("A"))
    return flat


def tile_grid(width: int, height: int, size: int, limit: int = MAX_TILES) -> tuple[int, int]:
    """Return the (columns, rows) of tiles that an image is cut into.

    It is the grid nearest to the image's aspect ratio. Of grids equally near, a larger one is taken
    if the image has more than half its pixels.

    Args:
        width: Image width in pixels.
        height: Image height in pixels.
        size: Side of a tile in pixels.
        limit: Most tiles, the thumbnail not counted.
    """
    aspect = width / height
    best = (1, 1)
    best_distance = math.inf
    for count in range(1, limit + 1):
        is_large = width * height > 0.5 * size * size * count
        for columns in range(1, count + 1):
            if count % columns:
                continue
            rows = count // columns
            distance = abs(aspect - columns / rows)
            if distance < best_distance or (distance == best_distance and is_large):
                best = (columns, rows)
                best_distance = distance
    return best


def image_tiles(image: Image.Image, config: CheckpointConfig) -> torch.Tensor:
    """Return the tiles of an RGB image, row by row; the thumbnail is last if there are several.

    Returns:
        float32 [tiles, 3, size, size], normalized by the config's `norm_mean` and `norm_std`.
    """
    size = config.tile_size
    columns, rows = tile_grid(image.width, image.height, size)
    pixels = np.array(image, dtype=np.uint8)
    tiles = cut_tiles(pixels, columns, rows, size, config.raw["use_thumbnail"])
    return _normalize(tiles, config)


def frame_tiles(frames: NDArray[np.uint8], config: CheckpointConfig) -> torch.Tensor:
    """Return one tile per video frame.

    Args:
        frames: uint8 [frames, height, width, 3], RGB.
        config: The checkpoint's.

    Returns:
        float32 [frames, 3, size, size], normalized.
    """
    size = config.tile_size
    return _normalize(resize_all(frames, size, size), config)


def _normalize(pixels: NDArray[np.uint8], config: CheckpointConfig) -> torch.Tensor:
    """Normalize uint8 [N, H, W, 3] to float32 [N, 3, H, W], as the model does on its device."""
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32)
    mean = torch.tensor(config.raw["norm_mean"]).reshape(1, 3, 1, 1)
    deviation = torch.tensor(config.raw["norm_std"]).reshape(1, 3, 1, 1)
    return ((values / 255.0 - mean) / deviation).contiguous()
