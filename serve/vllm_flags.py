"""Reads flags of `vllm serve`: their spellings, and which of them mean a setting of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from checkpoint.log import get_logger

logger = get_logger(__name__)

SHORT_FORMS = {"-tp": "--tensor-parallel-size"}
"""Short forms of those flags that `serve.command` gives."""

MEDIA_OPTIONS = "--media-io-kwargs"
"""vLLM's flag for how media are read; its value is a JSON object by modality."""

DEFAULT_FRAMES = 32
"""Frames that vLLM takes of any clip when its flag gives no number
(vllm/multimodal/media/video.py)."""


def _length(text: str) -> int:
    """Parse a length; vLLM's other forms (`128k`, `-1`, `auto`) raise ValueError."""
    length = int(text)
    if length < 0:
        raise ValueError(f"{text} lets vLLM choose")
    return length


_SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "--host": ("host", str),
    "--port": ("port", int),
    "--dtype": ("dtype", str),
    "--video-pruning-rate": ("video.pruning_rate", float),
    "--max-model-len": ("max_model_len", _length),
    "--tensor-parallel-size": ("tensor_parallel_size", int),
    "--gpu-memory-utilization": ("gpu_memory_utilization", float),
    "--api-key": ("api_key", str),
    "--ssl-certfile": ("ssl_certfile", str),
    "--ssl-keyfile": ("ssl_keyfile", str),
}
"""Flags that mean a setting of ours: its dotted name, and what parses the value."""

_SWITCHES = {"--use-replayssm": "replayssm"}
"""Flags without a value that mean a setting of ours; `--no-` before the name turns it off."""


def canonical(flag: str) -> str:
    """Return the one name of a flag that vLLM takes in several spellings.

    `--no-enable_prefix_caching` is `--enable-prefix-caching`, `-tp` is `--tensor-parallel-size`,
    and `--media-io-kwargs.video.fps=4` is `--media-io-kwargs`.
    """
    name = flag.split("=", 1)[0]
    name = name.split(".", 1)[0]
    name = name.replace("_", "-")
    name = SHORT_FORMS.get(name, name)
    if name.startswith("--no-"):
        return "--" + name.removeprefix("--no-")
    return name


def named_flags(arguments: Sequence[str]) -> set[str]:
    """Return the canonical names of all flags on a command line."""
    return {canonical(part) for part in arguments if is_flag(part)}


def is_flag(text: str) -> bool:
    """Return whether a part of a command line is a flag, not a value such as `-1`."""
    if not text.startswith("-"):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def setting_values(arguments: Sequence[str]) -> dict[str, Any]:
    """Return what flags of vLLM say about settings of ours.

    A value that does not parse (`--max-model-len 128k`) is for vLLM to read and is left out.

    Args:
        arguments: Flags of `vllm serve`.

    Returns:
        Values by the setting's dotted name, as `port` or `video.fps`.
    """
    values: dict[str, Any] = {}
    media: dict[str, Any] | None = None
    for flag, text in _flags_with_values(arguments):
        name = canonical(flag)
        try:
            if name == MEDIA_OPTIONS:
                media = (media or {}) | _video_media_options(flag, text)
            elif name in _SWITCHES:
                values[_SWITCHES[name]] = not flag.startswith("--no-")
            elif name in _SETTINGS:
                setting, parse = _SETTINGS[name]
                values[setting] = parse(text)
        except ValueError:
            logger.debug("%s %s is left to vLLM", flag, text)
    if media is not None:
        # Our own flag is left out, so vLLM's default applies to the number of frames. It has none
        # for fps: see `samples_without_fps`.
        values["video.max_frames"] = media.get("num_frames", DEFAULT_FRAMES)
        if "fps" in media:
            values["video.fps"] = media["fps"]
    return values


def flag_value(arguments: Sequence[str], name: str) -> str | None:
    """Return the last value given to a flag, by its canonical name; None when it is not given."""
    found = None
    for flag, text in _flags_with_values(arguments):
        if canonical(flag) == name:
            found = text
    return found


def samples_without_fps(arguments: Sequence[str]) -> bool:
    """Return whether vLLM's own flag fixes the number of frames, whatever a clip's length."""
    return MEDIA_OPTIONS in named_flags(arguments) and "video.fps" not in setting_values(arguments)


def _flags_with_values(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each flag without `=VALUE`, and its value: "" when there is none."""
    for position, part in enumerate(arguments):
        if not is_flag(part):
            continue
        flag, equals, value = part.partition("=")
        if not equals and position + 1 < len(arguments):
            value = arguments[position + 1]
        yield flag, value


def _video_media_options(flag: str, text: str) -> dict[str, Any]:
    """Return what `--media-io-kwargs` says about videos.

    Args:
        flag: `--media-io-kwargs`, or the same followed by a dotted key.
        text: The JSON value.

    Raises:
        ValueError: It is not a JSON object, and vLLM will refuse it.
    """
    value = json.loads(text)
    _, *keys = flag.split(".")
    for key in reversed(keys):
        value = {key: value}
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    video = value.get("video") or {}
    if not isinstance(video, dict):
        raise ValueError("video is not a JSON object")
    return video
