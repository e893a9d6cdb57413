"""A video loader for vLLM: clips come as uint8 frames of the model's size.

vLLM calls loaders on its media threads (VLLM_MEDIA_LOADING_THREAD_COUNT, 8), so several clips are
decoded and resized at once. What is left for its single thread of preparation is a hash of the
file and a few token ids.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm import envs
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

from hybridquant_vllm import __version__
from hybridquant_vllm.clip_cache import KEPT_CLIPS
from hybridquant_vllm.frames import MAX_FRAME_PIXELS
from hybridquant_vllm.step_times import timed


class FastVideoLoader(VideoLoader):
    """Decodes with `hybridquant_vllm.frames`."""

    frame_size: int | None = None
    """Side of the squares that frames are resized to; None leaves that to the processor."""

    @classmethod
    def load_bytes(
        cls,
        data: bytes,
        num_frames: int = -1,
        fps: float = -1,
        **kwargs: Any,
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Decode and sample a clip.

        Args:
            data: The file.
            num_frames: Most frames to take; -1 takes any number.
            fps: Frames to take per second; -1 takes any number.
            kwargs: Other options of vLLM's loaders, which mean nothing here.

        Returns:
            uint8 [frames, height, width, 3], and what vLLM's loaders say about a clip. Both the
            file and this metadata enter vLLM's cache key; `video_backend` adds our version.

        Raises:
            ValueError: The clip cannot be used; vLLM answers 400 with the reason.
        """
        limit = envs.VLLM_MAX_IMAGE_PIXELS
        max_pixels = min(MAX_FRAME_PIXELS, limit) if limit > 0 else MAX_FRAME_PIXELS
        size = None if cls.frame_size is None else (cls.frame_size, cls.frame_size)
        with timed("decode and resize"):
            clip = KEPT_CLIPS.read(
                data, fps=fps, max_frames=num_frames, size=size, max_pixels=max_pixels
            )
        return clip.frames, {
            "total_num_frames": clip.total,
            "fps": clip.fps,
            "duration": clip.total / clip.fps,
            "video_backend": f"hybridquant-{__version__}",
            "frames_indices": list(clip.indices),
            "do_sample_frames": False,
        }


def register_loader(frame_size: int | None) -> str:
    """Register the loader for a frame size, and return its name.

    Each size has its own name: as an option, a request could set it to any size.
    """
    name = f"hybridquant_{frame_size or 'any'}"
    loader = type("FastVideoLoader", (FastVideoLoader,), {"frame_size": frame_size})
    VIDEO_LOADER_REGISTRY.register(name)(loader)
    return name


def use_for(media_io_kwargs: dict[str, dict[str, Any]], frame_size: int | None) -> None:
    """Make a model's requests use the loader, unless its user has chosen another.

    Args:
        media_io_kwargs: The model's `--media-io-kwargs`; changed in place, as everything that
            loads media holds this very dictionary.
        frame_size: Side of the model's frames, or None if it depends on the clip.
    """
    video = media_io_kwargs.setdefault("video", {})
    has_chosen = "video_backend" in video or "backend" in video
    if not has_chosen and "VLLM_VIDEO_LOADER_BACKEND" not in os.environ:
        video["video_backend"] = register_loader(frame_size)
