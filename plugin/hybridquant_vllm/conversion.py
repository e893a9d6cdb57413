"""Converts decoded frames to RGB of the wanted size, on its own threads."""

from __future__ import annotations

from concurrent.futures import Future
from threading import BoundedSemaphore, Lock, local

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from hybridquant_vllm.clip import ClipError
from hybridquant_vllm.pixels import PIXEL_POOL, resize, worker_count

_reformatters = local()
"""A reformatter for each thread: setting one up takes as long as a conversion."""

FRAME_SLOTS = BoundedSemaphore(2 * worker_count())
"""Limits the frames that all clips together hold in full size."""


class ConvertedFrames:
    """Frames that are being converted and resized.

    Args:
        count: Number of frames.
        size: (height, width) of the result; None keeps the size of the frames.
        max_pixels: Most pixels of a frame.

    Attributes:
        rotation: Degrees by which frames are turned counterclockwise.
    """

    def __init__(self, count: int, size: tuple[int, int] | None, max_pixels: int) -> None:
        self.rotation = 0
        self._count = count
        self._size = size
        self._max_pixels = max_pixels
        self._lock = Lock()
        self._source: tuple[int, int] | None = None
        self._pixels: NDArray[np.uint8] | None = None
        self._tasks: dict[int, Future[None]] = {}

    def add(self, position: int, frame: VideoFrame) -> None:
        """Convert a frame on another thread; wait while too many are held."""
        with self._lock:
            self._prepare(frame)
        FRAME_SLOTS.acquire()
        task = PIXEL_POOL.executor.submit(self._convert, position, frame)
        task.add_done_callback(lambda _: FRAME_SLOTS.release())
        with self._lock:
            self._tasks[position] = task

    def add_now(self, position: int, frame: VideoFrame) -> None:
        """Convert a frame on this thread."""
        with self._lock:
            self._prepare(frame)
        with FRAME_SLOTS:
            self._convert(position, frame)
        done: Future[None] = Future()
        done.set_result(None)
        with self._lock:
            self._tasks[position] = done

    def result(self) -> tuple[NDArray[np.uint8], list[int]]:
        """Wait for all frames.

        Returns:
            uint8 [frames, height, width, 3], and the position of each.
        """
        for task in self._tasks.values():
            task.result()
        positions = sorted(self._tasks)
        if self._pixels is None:
            return np.empty((0, 0, 0, 3), np.uint8), []
        if len(positions) == self._count:
            return self._pixels, positions
        return self._pixels[positions], positions

    def _prepare(self, frame: VideoFrame) -> None:
        """Allocate the result at the first frame; the others must have its size."""
        source = (frame.height, frame.width)
        if self._source is None:
            if frame.height * frame.width > self._max_pixels:
                what = f"frames have {frame.width}x{frame.height} pixels"
                raise ClipError(f"{what}, at most {self._max_pixels} are served", "shrink them")
            self._source = source
            turned = source[::-1] if self._quarter_turns % 2 else source
            height, width = self._size or turned
            self._pixels = np.empty((self._count, height, width, 3), np.uint8)
        if source != self._source:
            what = "frame size changes within the video"
            raise ClipError(what, "write the file again in one size")

    @property
    def _quarter_turns(self) -> int:
        # Phones write portrait clips as landscape frames and a rotation, which OpenCV applies.
        return round(self.rotation / 90) % 4

    def _convert(self, position: int, frame: VideoFrame) -> None:
        reformatter = getattr(_reformatters, "value", None)
        if reformatter is None:
            reformatter = _reformatters.value = VideoReformatter()
        # Chroma is scaled bicubically, as OpenCV does: FFmpeg's default differs by several grey
        # levels at coloured edges.
        rgb = reformatter.reformat(
            frame, format="rgb24", interpolation=Interpolation.BICUBIC, threads=1
        )
        upright = np.rot90(rgb.to_ndarray(), k=self._quarter_turns)
        assert self._pixels is not None
        place = self._pixels[position]
        place[:] = resize(np.ascontiguousarray(upright), *place.shape[:2])
