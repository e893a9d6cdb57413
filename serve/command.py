"""Builds the `vllm serve` command for a checkpoint directory: one place that knows which version
wants which flag.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from checkpoint.config import CheckpointConfig, read_config, read_json
from serve.environment import Device
from serve.settings import ServeSettings

# config.json's quantization_config.quant_algo → vLLM's --quantization (its
# ModelOpt*Config.get_name(), 0.11 to 0.33).
QUANTIZATION = {
    "FP8": "modelopt",
    "NVFP4": "modelopt_fp4",
    "W4A16_NVFP4": "modelopt_fp4",
    "MIXED_PRECISION": "modelopt_mixed",
}

# Tokens of the text before each frame, "Frame 128 sampled at 3599.50 seconds: <img>…</img>": 16
# with the released tokenizer (digits are single tokens), 19 with the tiny one.
FRAME_TEXT_TOKENS = 24
PROMPT_TEXT_TOKENS = 1024

# vLLM's long options that have a short form.
_ALIASES = {"-tp": "--tensor-parallel-size", "-q": "--quantization", "-O": "--compilation-config"}

# vLLM flags that are settings of ours as well.
_ADOPTED: dict[str, tuple[str, Callable[[str], Any]]] = {
    "--host": ("host", str),
    "--port": ("port", int),
    "--video-pruning-rate": ("video_pruning_rate", float),
    "--max-model-len": ("max_model_len", int),
    "--tensor-parallel-size": ("tensor_parallel_size", int),
}

Flag = tuple[str, str | None]


def quant_algo(config: CheckpointConfig) -> str | None:
    """`FP8`, `NVFP4`, `MIXED_PRECISION` or what else config.json names; None for BF16.

    Without a section there vLLM looks into hf_quant_config.json, so we do too.
    """
    section = config.raw.get("quantization_config")
    legacy = config.directory / "hf_quant_config.json"
    if section is None and legacy.exists():
        section = read_json(legacy).get("quantization")
    if not isinstance(section, dict):
        return None
    return str(section.get("quant_algo") or "").upper() or "unnamed"


def batched_tokens(config: CheckpointConfig, settings: ServeSettings) -> int:
    """Tokens that one scheduler step must hold: one clip at the most frames, and the question about
    it.

    vLLM's source says of this model that a video cannot be prefilled in chunks; 0.32 can (equal
    log-probabilities with 2,048 tokens a step and with 49,152), older ones were not tried. A clip's
    length follows from the pruning rate q and the number of frames T alone: max(n, int(n · T · (1 −
    q))) visual tokens with n a frame (vllm/multimodal/video_prune/evs.py), and the text before each
    frame, which EVS keeps.
    """
    per_frame, frames = config.tokens_per_tile, settings.max_frames
    visual = max(per_frame, int(per_frame * frames * (1 - settings.video_pruning_rate)))
    tokens = visual + frames * FRAME_TEXT_TOKENS + PROMPT_TEXT_TOKENS
    rounded = -(-tokens // 1024) * 1024
    longest = settings.max_model_len or config.max_length
    return max(2048, min(rounded, longest))


def build_command(
    directory: str | Path,
    settings: ServeSettings,
    vllm_version: tuple[int, int, int],
    device: Device,
    extra: Sequence[str] = (),
) -> list[str]:
    """The command line, from `vllm` on.

    Args:
        directory: A checkpoint, BF16 or quantized; its precision is read from config.json.
        settings: How to serve it.
        vllm_version: (major, minor, patch).
        device: What vLLM will run on.
        extra: More vLLM flags, as given after `--`. They win: a flag of ours that is named there is
            left out.

    Raises:
        BadInput: When config.json is missing or describes another model.
    """
    config = read_config(directory)
    flags = _drop_overridden(_flags(config, settings, vllm_version, device), extra)
    ours = [part for flag, value in flags for part in ([flag] if value is None else [flag, value])]
    return ["vllm", "serve", str(Path(directory)), *ours, *extra]


def build_environment(config: CheckpointConfig, device: Device) -> dict[str, str]:
    """Environment variables that go with the command."""
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        # The command runs in whatever directory the user is in; a serve/ or export/ there must not
        # be imported.
        "PYTHONSAFEPATH": "1",
    }
    if device.kind == "cpu":
        # GiB. The tiny checkpoint's cache holds 970,000 tokens in one; the 12B needs 24 KB a token
        # and 147 MB a sequence (28 Mamba layers × 128 heads × 80 × 128 states in float32).
        variables["VLLM_CPU_KVCACHE_SPACE"] = "1" if config.text["hidden_size"] < 1024 else "8"
    return variables


def adopt(settings: ServeSettings, extra: Sequence[str]) -> ServeSettings:
    """`settings` with what `extra` says about them, so that we wait at the port and state the rate
    that vLLM will use.

    A value that does not parse (`--max-model-len 128k`) is vLLM's business and leaves the setting
    alone.
    """
    adopted: dict[str, Any] = {}
    for position, part in enumerate(extra):
        name, equals, value = part.partition("=")
        field, parse = (
            _ADOPTED.get(canonical(name), (None, str)) if part.startswith("-") else (None, str)
        )
        if field is None:
            continue
        text = value if equals else (extra[position + 1] if position + 1 < len(extra) else "")
        with contextlib.suppress(ValueError):
            adopted[field] = parse(text)
    return dataclasses.replace(settings, **adopted)


def _flags(
    config: CheckpointConfig,
    settings: ServeSettings,
    vllm_version: tuple[int, int, int],
    device: Device,
) -> list[Flag]:
    flags: list[Flag] = [
        ("--served-model-name", config.directory.resolve().name),
        ("--host", settings.host),
        ("--port", str(settings.port)),
        ("--trust-remote-code", None),
        ("--dtype", settings.dtype),
    ]
    if algo := quant_algo(config):
        flags.append(("--quantization", QUANTIZATION[algo]))
    if settings.max_model_len is not None:
        flags.append(("--max-model-len", str(settings.max_model_len)))
    if vllm_version < (0, 20, 0):
        # Left to itself, vLLM kept this model's state in the model's dtype until its pull request
        # 39032. The symptom: answers that begin well and drift into fluent nonsense.
        flags.append(("--mamba-ssm-cache-dtype", "float32"))
    # Prefix caching of Mamba states has been wrong in several releases (vLLM issues 45699, 53912),
    # and on CPU it kills the engine at the first prompt longer than a block: "IndexError: index 14
    # is out of bounds" in mamba_mixer2.
    flags.append(("--no-enable-prefix-caching", None))
    flags += [
        ("--max-num-batched-tokens", str(batched_tokens(config, settings))),
        (
            "--limit-mm-per-prompt",
            _json({"image": settings.max_images, "video": settings.max_videos}),
        ),
        # Without this vLLM samples 32 frames of any clip, however long.
        (
            "--media-io-kwargs",
            _json({"video": {"fps": _plain(settings.fps), "num_frames": settings.max_frames}}),
        ),
        # vLLM ignores config.json's video_pruning_rate, and prunes nothing without the flag.
        ("--video-pruning-rate", f"{settings.video_pruning_rate:g}"),
    ]
    if settings.allowed_local_media_path is not None:
        flags.append(
            ("--allowed-local-media-path", str(settings.allowed_local_media_path.resolve()))
        )
    if device.kind == "cpu":
        # Compiling takes a minute and gains nothing at this size.
        flags.append(("--enforce-eager", None))
    else:
        if settings.gpu_memory_utilization is not None:
            flags.append(("--gpu-memory-utilization", f"{settings.gpu_memory_utilization:g}"))
        if settings.tensor_parallel_size > 1:
            flags.append(("--tensor-parallel-size", str(settings.tensor_parallel_size)))
    return flags


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _drop_overridden(flags: list[Flag], extra: Sequence[str]) -> list[Flag]:
    """Leave out our flags that `extra` names, in any of vLLM's spellings: argparse would take the
    last and say nothing, but `--x` beside `--no-x`, or a JSON value beside a dotted key, is read
    differently by different versions.
    """
    named = {canonical(part) for part in extra if part.startswith("-") and not _is_number(part)}
    return [(flag, value) for flag, value in flags if canonical(flag) not in named]


def canonical(flag: str) -> str:
    """`--enable-prefix-caching` of `--no-enable_prefix_caching`, `--media-io-kwargs` of
    `--media-io-kwargs.video=…`.
    """
    name = flag.split("=", 1)[0].split(".", 1)[0].replace("_", "-")
    name = _ALIASES.get(name, name)
    return "--" + name.removeprefix("--no-") if name.startswith("--no-") else name


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
