"""Checks what a request says about how its clips are sampled, and bounds the frames it gets.

A server started with `--trust-request-mm-kwargs` takes `media_io_kwargs` from requests. vLLM hands
them to the loader as they are: NaN frames per second were answered with 500, `num_frames: -1` made
it decode all frames of any clip, and frames sent as `data:video/jpeg` were divided by their `fps`,
also if that is 0. Here such values get 400 and the reason, and no clip gives more frames than the
server's own `num_frames`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.connector import MODALITY_IO_MAP
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

FEWEST_FPS = 0.0001
"""Four hours of video, the longest clip that is served, then give two frames."""

MOST_FPS = 1000
"""Time stamps are whole milliseconds."""

MOST_INDEX = 10**9
"""Largest place of a frame in its file, for frames that a request sends as pictures."""

VLLM_FRAMES = 32
"""Frames that vLLM's VideoMediaIO takes where neither server nor request names a number."""

_LONGEST_VALUE = 40


class BoundedVideoIO(VideoMediaIO):
    """vLLM's reader of clips; options of requests are checked before they replace the server's."""

    most_frames: ClassVar[int] = VLLM_FRAMES
    """Most frames of a clip, whatever a request asks for."""

    @classmethod
    def merge_kwargs(
        cls, default_kwargs: dict[str, Any] | None, runtime_kwargs: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Return the options of a request's clips.

        Args:
            default_kwargs: The server's `--media-io-kwargs` for video.
            runtime_kwargs: The request's.

        Raises:
            VLLMValidationError: The request's cannot be used; vLLM answers 400.
        """
        check(runtime_kwargs or {}, cls.most_frames)
        merged = super().merge_kwargs(default_kwargs, runtime_kwargs)
        frames = merged.get("num_frames", VLLM_FRAMES)
        merged["num_frames"] = min(frames, cls.most_frames) if frames > 0 else cls.most_frames
        # -1 is vLLM's word for any rate, which is what no rate means as well. Frames that are sent
        # as pictures would be given negative time stamps.
        if "fps" in merged and merged["fps"] <= 0:
            del merged["fps"]
        return merged


def check(options: dict[str, Any], most_frames: int) -> None:
    """Check the options for video of a request.

    Args:
        options: Of `media_io_kwargs["video"]`; those that are not known are left to vLLM.
        most_frames: Most frames of a clip.

    Raises:
        VLLMValidationError: One cannot be used.
    """
    frames = options.get("num_frames", -1)
    if not _is_whole(frames, 1, most_frames) and not _is_whole(frames, -1, -1):
        raise _refused("num_frames", frames, f"a whole number from 1 to {most_frames}, or -1")
    fps = options.get("fps", -1)
    if not _is_number(fps, FEWEST_FPS, MOST_FPS) and not _is_number(fps, -1, -1):
        raise _refused("fps", fps, f"a number from {FEWEST_FPS} to {MOST_FPS}, or -1")
    total = options.get("total_num_frames", 1)
    if not _is_whole(total, 1, MOST_INDEX):
        raise _refused("total_num_frames", total, f"a whole number from 1 to {MOST_INDEX}")
    duration = options.get("duration")
    if duration is not None and not _is_number(duration, 0, MOST_INDEX):
        raise _refused("duration", duration, f"a number of seconds from 0 to {MOST_INDEX}")
    indices = options.get("frames_indices")
    if indices is not None:
        is_list = isinstance(indices, list)
        if not is_list or not all(_is_whole(index, 0, MOST_INDEX) for index in indices):
            raise _refused("frames_indices", indices, f"a list of whole numbers to {MOST_INDEX}")
    for name in ("video_backend", "backend"):
        value = options.get(name)
        if value is not None and not isinstance(value, str):
            raise _refused(name, value, "a name")
    loader = options.get("video_backend")
    if loader and loader not in VIDEO_LOADER_REGISTRY.name2class:
        raise _refused("video_backend", loader, "a loader of this server")


def _is_number(value: Any, least: float, most: float) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and least <= value <= most  # NaN is not


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _refused(name: str, value: Any, expected: str) -> VLLMValidationError:
    shown = repr(value)[:_LONGEST_VALUE]
    what = f"media_io_kwargs: {name} of video is {shown}, not {expected}"
    return VLLMValidationError(what)


def bound(media_io_kwargs: dict[str, dict[str, Any]], frames_of_context: int) -> None:
    """Make vLLM check and bound the options of requests; a second call changes nothing.

    Args:
        media_io_kwargs: The model's `--media-io-kwargs`.
        frames_of_context: Frames that the model's context holds; they are the most where the
            server names no number.
    """
    frames = media_io_kwargs.get("video", {}).get("num_frames", 0)
    most = frames if _is_whole(frames, 1, MOST_INDEX) else max(frames_of_context, VLLM_FRAMES)
    MODALITY_IO_MAP["video"] = type("BoundedVideoIO", (BoundedVideoIO,), {"most_frames": most})
