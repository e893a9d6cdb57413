"""Reads flags of `vllm serve`: their spellings, and which of them mean a setting of ours.

`CheckedFlags` hold what vLLM's own parser makes of flags: it also takes the beginning of a name
(`--max-num-b`), sizes (`8k`) and a file of flags (`--config FILE`). Every function here takes them,
or a plain sequence, of which it understands whole names and plain values.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from checkpoint.faults import Fault, shortened
from checkpoint.log import get_logger

logger = get_logger(__name__)

SHORT_FORMS = {"-tp": "--tensor-parallel-size"}
"""Short forms of those flags that `serve.command` gives."""

MEDIA_OPTIONS = "--media-io-kwargs"
"""vLLM's flag for how media are read; its value is a JSON object by modality."""

LIMITS = "--limit-mm-per-prompt"
"""vLLM's flag for how many media a prompt may have; its value is a JSON object by modality."""

LENGTH_FLAG = "--max-model-len"

DEFAULT_LIMIT = 999
"""Media of one kind in a prompt where vLLM's flag does not name the kind
(vllm/config/multimodal.py)."""

DEFAULT_FRAMES = 32
"""Frames that vLLM takes of any clip when its flag gives no number
(vllm/multimodal/media/video.py)."""


def _length(text: str) -> int:
    """Parse a length; vLLM's other forms (`-1`, `auto`) raise ValueError."""
    length = int(text)
    if length < 0:
        raise ValueError(f"{text} lets vLLM choose")
    return length


_DTYPES = {"auto": "bfloat16", "half": "float16", "float": "float32"}
"""vLLM's other names of types. `auto` is the checkpoint's, which is BF16 beside what is
quantized."""


def _dtype(text: str) -> str:
    return _DTYPES.get(text, text)


_SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "--host": ("host", str),
    "--port": ("port", int),
    "--dtype": ("dtype", _dtype),
    "--video-pruning-rate": ("video.pruning_rate", float),
    LENGTH_FLAG: ("max_model_len", _length),
    "--tensor-parallel-size": ("tensor_parallel_size", int),
    "--gpu-memory-utilization": ("gpu_memory_utilization", float),
    "--api-key": ("api_key", str),
    "--ssl-certfile": ("ssl_certfile", str),
    "--ssl-keyfile": ("ssl_keyfile", str),
}
"""Flags that mean a setting of ours: its dotted name, and what parses the value."""

_SWITCHES = {"--use-replayssm": "replayssm"}
"""Flags without a value that mean a setting of ours; `--no-` before the name turns it off."""


@dataclass(frozen=True)
class CheckedFlags(Sequence[str]):
    """Flags of `vllm serve`, the sequence of what was given, and what vLLM's parser makes of them.

    Attributes:
        given: The flags as they were given.
        read: The same flags as `--name=value`, with names in full, plain numbers, and what their
            `--config FILE` holds; as given where vLLM refuses them or was not asked.
        refused: Why vLLM refuses them; "" when it does not.
        known: Names of all flags of vLLM, where it refuses these.
    """

    given: tuple[str, ...]
    read: tuple[str, ...]
    refused: str = ""
    known: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: Any) -> Any:
        return self.given[index]


def checked_flags(given: Sequence[str], answer: Mapping[str, Any]) -> CheckedFlags:
    """Return flags with what vLLM's parser makes of them.

    Args:
        given: The flags.
        answer: What serve/probe.py says of them.
    """
    if "unread" in answer:
        what = "vLLM was not asked about its flags, so that the plan may misread them"
        logger.warning("%s: %s", what, shortened(answer["unread"]))
    read = tuple(_written(answer["read"])) if "read" in answer else tuple(given)
    refused = answer.get("refused", "")
    return CheckedFlags(tuple(given), read, refused, tuple(answer.get("known", ())))


def flags_after(more: Sequence[str], flags: Sequence[str]) -> Sequence[str]:
    """Return flags with others, whose names are in full, before them."""
    joined = (*more, *flags)
    if isinstance(flags, CheckedFlags):
        return replace(flags, given=joined, read=(*more, *flags.read))
    return joined


def _written(read: Sequence[tuple[str, Any]]) -> Iterator[str]:
    """Yield names and values, as vLLM has parsed them, as parts of a command line."""
    for name, value in read:
        if value is True:
            yield name
        elif value is False:
            yield "--no-" + name.removeprefix("--")
        elif isinstance(value, list):
            for item in value:
                yield f"{name}={item}"
        elif isinstance(value, dict):
            yield f"{name}={json.dumps(value)}"
        elif value is None:
            yield f"{name}="
        else:
            yield f"{name}={value}"


def flag_faults(arguments: Sequence[str]) -> Iterator[Fault]:
    """Yield what keeps vLLM from taking its flags, in one sentence: an unknown one, a value that is
    none.

    Nothing is yielded for a plain sequence, which vLLM was not asked about.
    """
    if not isinstance(arguments, CheckedFlags):
        return
    if arguments.refused:
        # Python's names of types and functions: "<function loads at 0x7f63f2e1b1a0>".
        reason = re.sub(r"<(?:class|function) '?([\w.]+)[^>]*>", r"\1", arguments.refused)
        yield Fault("flags after --", f"vLLM refuses them: {shortened(reason)}", _remedy(arguments))
    elif "--config" in named_flags(arguments.read):
        what = "is ignored by vLLM where its file follows a sign of equality or its name is cut"
        yield Fault("--config", what, "write --config FILE")


def _remedy(flags: CheckedFlags) -> str:
    """Return a remedy for flags that vLLM refuses."""
    if "--model" in named_flags(flags):
        return "DIR is the model, so leave --model out"
    if not flags.refused.startswith("unrecognized arguments"):
        return "correct it, or leave it out"
    for name in sorted(named_flags(flags) - set(flags.known)):
        near = difflib.get_close_matches(name, flags.known, n=1)
        if near:
            return f"did you mean {near[0]}?"
    return "vllm serve --help=all names every flag"


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
    return {canonical(part) for part in _read(arguments) if is_flag(part)}


def switched_on(arguments: Sequence[str]) -> set[str]:
    """Return `named_flags` without those that are given as `--no-…`."""
    return named_flags([part for part in _read(arguments) if not part.startswith("--no-")])


def _read(arguments: Sequence[str]) -> Sequence[str]:
    """Return flags as vLLM reads them, where it was asked."""
    return arguments.read if isinstance(arguments, CheckedFlags) else arguments


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

    A value that does not parse is for vLLM to read and is left out: `--max-model-len auto`, and
    without its parser `128k`.

    Args:
        arguments: Flags of `vllm serve`.

    Returns:
        Values by the setting's dotted name, as `port` or `video.fps`.
    """
    values: dict[str, Any] = {}
    media: dict[str, Any] | None = None
    limits: dict[str, Any] | None = None
    for flag, text in flags_with_values(arguments):
        name = canonical(flag)
        try:
            if name == MEDIA_OPTIONS:
                media = (media or {}) | _video_media_options(flag, text)
            elif name == LIMITS:
                limits = (limits or {}) | _json_object(flag, text)
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
    if limits is not None:
        values["max_images"] = _most(limits.get("image", DEFAULT_LIMIT))
        values["max_videos"] = _most(limits.get("video", DEFAULT_LIMIT))
    return values


def _most(limit: Any) -> Any:
    """Return a limit of media, which vLLM takes as a number or as an object that holds it."""
    if isinstance(limit, dict):
        return limit.get("count", DEFAULT_LIMIT)
    return limit


def flag_value(arguments: Sequence[str], name: str) -> str | None:
    """Return the last value given to a flag, by its canonical name; None when it is not given."""
    found = None
    for flag, text in flags_with_values(arguments):
        if canonical(flag) == name:
            found = text
    return found


def json_value(arguments: Sequence[str], name: str) -> dict[str, Any]:
    """Return the object that a flag gives as JSON, whole or by dotted keys, or an empty one."""
    found: dict[str, Any] = {}
    for flag, text in flags_with_values(arguments):
        if canonical(flag) == name:
            with contextlib.suppress(ValueError):  # which vLLM refuses
                found |= _json_object(flag, text)
    return found


def lets_vllm_choose_length(arguments: Sequence[str]) -> bool:
    """Return whether vLLM is told to find the longest sequence that its memory holds."""
    return flag_value(arguments, LENGTH_FLAG) in ("-1", "auto")


def samples_without_fps(arguments: Sequence[str]) -> bool:
    """Return whether vLLM's own flag fixes the number of frames, whatever a clip's length."""
    return MEDIA_OPTIONS in named_flags(arguments) and "video.fps" not in setting_values(arguments)


def flags_with_values(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each flag without `=VALUE`, and its value: "" when there is none."""
    arguments = _read(arguments)
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
    video = _json_object(flag, text).get("video") or {}
    if not isinstance(video, dict):
        raise ValueError("video is not a JSON object")
    return video


def _json_object(flag: str, text: str) -> dict[str, Any]:
    """Return the object that a flag gives, whole or at a dotted key.

    Raises:
        ValueError: It is not a JSON object.
    """
    value = json.loads(text)
    _, *keys = flag.split(".")
    for key in reversed(keys):
        value = {key: value}
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value
