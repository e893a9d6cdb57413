"""Builds the `vllm serve` command of a checkpoint directory: which version needs which flag."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint.config import CheckpointConfig, read_config
from checkpoint.endpoint import KEY_VARIABLE
from serve.decoding import decoding_variables
from serve.environment import Device
from serve.precision import Version
from serve.settings import ServeSettings
from serve.state_update import FOLDER_VARIABLE, REPLAY_STATE, STATE_FLAG, find_tuned
from serve.vllm_flags import canonical, named_flags

FRAME_TEXT_TOKENS = 24
"""Tokens of the text before each frame, "Frame 128 sampled at 3599.50 seconds: <img>…</img>", at
most: 16 with the released tokenizer (digits are single tokens), 19 with the tiny one."""

PROMPT_TEXT_TOKENS = 1024
"""Tokens that one step has room for beside a clip."""

STEP_TOKENS = 2048
"""Fewest tokens of a scheduler step, vLLM's own default."""

REDIRECTS = "VLLM_MEDIA_URL_ALLOW_REDIRECTS"

FETCHES = "VLLM_MEDIA_FETCH_MAX_RETRIES"
"""vLLM's variable for how often a medium is fetched: each time it waits four times as long."""

MEDIA_THREADS = "VLLM_MEDIA_LOADING_THREAD_COUNT"

CPU_SPACE = "VLLM_CPU_KVCACHE_SPACE"

TORCH_THREADS = "OMP_NUM_THREADS"

NO_HOST = "remote-media-are-off.invalid"
"""The only host that requests may name when none is allowed: names below .invalid exist nowhere
(RFC 2606). Without any host in its flag, vLLM fetches from all. The name is in its refusal."""

KEY_GUARD = "hybridquant_vllm.key_guard.KeyGuard"
"""The plug-in's class that asks for the key at all addresses; vLLM's own check leaves some open."""

MIDDLEWARE_FLAG = "--middleware"
"""A flag of vLLM that may be repeated: the user's adds to ours."""

Flag = tuple[str, ...]
"""A flag of vLLM and its values."""


def build_command(
    directory: str | Path,
    settings: ServeSettings,
    vllm_version: Version,
    device: Device,
    extra: Sequence[str] = (),
) -> list[str]:
    """Return the command line, from `vllm` on.

    Args:
        directory: A checkpoint, BF16 or quantized.
        settings: How to serve it.
        vllm_version: (major, minor, patch).
        device: What vLLM will run on.
        extra: More vLLM flags, as given after `--`. They win: a flag of ours that is named there is
            left out.

    Raises:
        BadInput: config.json is missing or describes another model.
    """
    config = read_config(directory)
    flags = _model_flags(config, settings, vllm_version)
    flags += _media_flags(settings)
    if vllm_version < (0, 32, 0):
        # There, pages of all origins that a browser shows may use a server on this machine.
        flags.append(("--allowed-origins", "[]"))
    if has_key(settings):
        flags.append((MIDDLEWARE_FLAG, KEY_GUARD))
    flags += _device_flags(settings, device)
    # Of a flag given twice argparse silently takes the last, but `--x` beside `--no-x`, or a JSON
    # value beside a dotted key, is read differently by different versions.
    named = named_flags(extra)
    command = ["vllm", "serve", str(directory)]
    for flag, *values in flags:
        if flag == MIDDLEWARE_FLAG or canonical(flag) not in named:
            command += [flag, *values]
    return [*command, *extra]


def build_environment(
    config: CheckpointConfig, settings: ServeSettings, device: Device, extra: Sequence[str] = ()
) -> dict[str, str]:
    """Return the environment variables that go with the command; what the user has set is kept.

    Args:
        config: The checkpoint's.
        settings: How to serve it.
        device: What vLLM will run on.
        extra: Flags of vLLM that will be added.
    """
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        MEDIA_THREADS: str(media_threads()),
        # A host that is allowed could send the server on to one that is not.
        REDIRECTS: "0",
        # vLLM's three fetches of a clip from a host that is silent take ten minutes.
        FETCHES: "2",
    }
    if device.kind == "cuda":
        # vLLM's API server makes tensors of media with one thread of torch where this is not set.
        variables[TORCH_THREADS] = str(media_threads())
    if device.kind == "cpu":
        # GiB. The tiny checkpoint's cache holds a million tokens in one; the 12B needs 24 KB per
        # token and 149 MB per sequence: see serve/memory.py.
        is_small = config.hidden_size < 1024
        variables[CPU_SPACE] = "1" if is_small else "8"
    tuned = find_tuned(config, device, extra)
    if tuned is not None and tuned.is_there:
        variables[FOLDER_VARIABLE] = str(tuned.folder)
    chosen = {name: value for name, value in variables.items() if name not in os.environ}
    chosen |= decoding_variables(settings)
    # The command runs in whatever directory the user is in; a serve/ or export/ there must not be
    # imported.
    return chosen | {"PYTHONSAFEPATH": "1"}


def has_key(settings: ServeSettings) -> bool:
    """Return whether requests need a key: a setting's, or the one that the server inherits."""
    return bool(settings.api_key or os.environ.get(KEY_VARIABLE))


def media_threads() -> int:
    """Return on how many threads vLLM reads the media of requests: one a core, 2 to 16.

    vLLM's own number is 8, whatever the machine.
    """
    given = os.environ.get(MEDIA_THREADS, "")
    if given.isdecimal():
        return int(given)
    cores = len(os.sched_getaffinity(0))
    return min(max(cores, 2), 16)


def longest_sequence(config: CheckpointConfig, settings: ServeSettings) -> int:
    """Return the tokens of the longest sequence that is served."""
    return settings.max_model_len or config.max_length


def batched_tokens(config: CheckpointConfig, settings: ServeSettings) -> int:
    """Return the tokens that one scheduler step must hold: one clip of the most frames, and the
    question about it.

    vLLM's source says of this model that a video cannot be prefilled in chunks; 0.32 can (equal
    log-probabilities with 2,048 tokens per step and with 49,152), older ones were not tried. A
    clip's length depends on the pruning rate q and the number of frames T alone: max(n,
    int(n · T · (1 − q))) visual tokens with n per frame (vllm/multimodal/video_prune/evs.py), and
    the text before each frame, which EVS keeps.
    """
    per_frame = config.tokens_per_tile
    frames = settings.video.max_frames
    kept = 1 - settings.video.pruning_rate
    visual = max(per_frame, int(per_frame * frames * kept))
    tokens = visual + frames * FRAME_TEXT_TOKENS + PROMPT_TEXT_TOKENS
    rounded = -(-tokens // 1024) * 1024
    return max(STEP_TOKENS, min(rounded, longest_sequence(config, settings)))


def _model_flags(
    config: CheckpointConfig, settings: ServeSettings, vllm_version: Version
) -> list[Flag]:
    flags: list[Flag] = [
        ("--served-model-name", config.directory.resolve().name),
        ("--host", settings.host),
        ("--port", str(settings.port)),
        ("--dtype", settings.dtype),
    ]
    for flag, file in (
        ("--ssl-certfile", settings.ssl_certfile),
        ("--ssl-keyfile", settings.ssl_keyfile),
    ):
        if file is not None:
            flags.append((flag, str(file)))
    if settings.max_model_len is not None:
        flags.append(("--max-model-len", str(settings.max_model_len)))
    if vllm_version < (0, 20, 0):
        # Left to itself, vLLM kept this model's state in the model's dtype until its pull request
        # 39032. The symptom: answers that begin well and drift into fluent nonsense.
        flags.append((STATE_FLAG, "float32"))
    # Prefix caching of Mamba states has been wrong in several releases (vLLM issues 45699, 53912),
    # and on a CPU it kills the engine at the first prompt longer than a block: "IndexError: index
    # 14 is out of bounds" in mamba_mixer2.
    flags.append(("--no-enable-prefix-caching",))
    flags.append(("--max-num-batched-tokens", str(batched_tokens(config, settings))))
    return flags


def _media_flags(settings: ServeSettings) -> list[Flag]:
    video = settings.video
    limits = {"image": settings.max_images, "video": settings.max_videos}
    # Without this vLLM samples 32 frames of any clip, however long. It wants both keys.
    sampling = {"video": {"fps": _plain(video.fps), "num_frames": video.max_frames}}
    flags: list[Flag] = [
        ("--limit-mm-per-prompt", _json(limits)),
        ("--media-io-kwargs", _json(sampling)),
        # vLLM ignores config.json's video_pruning_rate, and prunes nothing without the flag.
        ("--video-pruning-rate", str(_plain(video.pruning_rate))),
        ("--allowed-media-domains", *(settings.allowed_media_domains or (NO_HOST,))),
    ]
    if settings.allowed_local_media_path is not None:
        allowed = settings.allowed_local_media_path.resolve()
        flags.append(("--allowed-local-media-path", str(allowed)))
    return flags


def _device_flags(settings: ServeSettings, device: Device) -> list[Flag]:
    if device.kind == "cpu":
        # Compiling takes a minute and gains nothing at this size.
        return [("--enforce-eager",)]
    flags: list[Flag] = []
    if settings.gpu_memory_utilization is not None:
        flags.append(("--gpu-memory-utilization", f"{settings.gpu_memory_utilization:g}"))
    if settings.replayssm:
        flags.append(("--use-replayssm",))
        flags.append((STATE_FLAG, REPLAY_STATE))
    if settings.tensor_parallel_size > 1:
        flags.append(("--tensor-parallel-size", str(settings.tensor_parallel_size)))
    return flags


def _plain(number: float) -> int | float:
    """Return 2 for 2.0, as a person would write it."""
    if number.is_integer():
        return int(number)
    return number


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
