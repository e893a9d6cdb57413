"""Resizes pictures and frames in uint8, on its own threads.

The filter is Pillow's antialiased bicubic one, which the model was trained with: PyTorch's uint8
kernel uses Pillow's fixed-point arithmetic and clamps to 0 … 255. It works on one picture in one
thread and releases the interpreter's lock, so frames are resized in parallel whatever number of
threads PyTorch itself may use (vLLM sets that to one while it prepares a request).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def worker_count() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Pool:
    """Threads that are started at the first use, and again in a forked process.

    Args:
        name: Beginning of the threads' names.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = Lock()
        self._process = 0
        self._executor: ThreadPoolExecutor | None = None

    @property
    def executor(self) -> ThreadPoolExecutor:
        """The threads, as many as there are cores."""
        with self._lock:
            if self._executor is None or self._process != os.getpid():
                self._executor = ThreadPoolExecutor(worker_count(), self._name)
                self._process = os.getpid()
            return self._executor

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """Return `function` of every item, in the order of the items."""
        return list(self.executor.map(function, items))


PIXEL_POOL = Pool("hybridquant-pixels")
"""Converts and resizes; its tasks wait for no other task."""


def resize(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize one picture with an antialiased bicubic filter.

    Args:
        pixels: uint8 [H, W, 3].
        height: Of the result.
        width: Of the result.

    Returns:
        uint8 [height, width, 3]; `pixels` itself if it has that size.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    # Channels last in memory, for which PyTorch has a vectorized kernel.
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        planes, size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def resize_all(frames: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize pictures of one size in parallel.

    Args:
        frames: uint8 [N, H, W, 3].
        height: Of the result.
        width: Of the result.

    Returns:
        uint8 [N, height, width, 3]; `frames` itself if they have that size.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    resized = np.empty((len(frames), height, width, 3), np.uint8)

    def resize_one(index: int) -> None:
        resized[index] = resize(frames[index], height, width)

    PIXEL_POOL.map(resize_one, range(len(frames)))
    return resized


def cut_tiles(
    pixels: NDArray[np.uint8], columns: int, rows: int, size: int, thumbnail: bool
) -> NDArray[np.uint8]:
    """Cut a picture into square tiles, row by row.

    Args:
        pixels: uint8 [H, W, 3].
        columns: Tiles across.
        rows: Tiles down.
        size: Side of a tile in pixels.
        thumbnail: Whether the whole picture follows as a last tile, if there are several.

    Returns:
        uint8 [tiles, size, size, 3].
    """
    whole = resize(pixels, rows * size, columns * size)
    grid = whole.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    tiles = grid.reshape(rows * columns, size, size, 3)
    if thumbnail and len(tiles) > 1:
        tiles = np.concatenate([tiles, resize(pixels, size, size)[None]])
    return tiles
