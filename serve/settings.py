"""How a checkpoint is served: defaults, what the checkpoint's own manifest says, what the command
line says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.config import read_json
from checkpoint.faults import BadInput, Fault, raise_if_any

MANIFEST = "hybridquant.json"

# What a recipe may fix for its checkpoint; host, port and the like belong to the machine.
MANIFEST_KEYS = (
    "video_pruning_rate",
    "max_model_len",
    "max_frames",
    "fps",
    "max_images",
    "max_videos",
)


@dataclass(frozen=True)
class ServeSettings:
    """Settings of one server.

    Attributes:
        video_pruning_rate: EVS rate q in [0, 1): the share of a clip's visual tokens that is
            dropped. 0 is off.
        max_model_len: Longest sequence in tokens; the checkpoint's own limit when None.
        max_frames: Most frames sampled of a clip (128 in the technical report, section 3).
        fps: Frames sampled a second, uniformly over the clip when that would exceed `max_frames`.
        max_images: Most images of a prompt.
        max_videos: Most videos of a prompt. One, because one prefill step must hold a whole clip.
        host: Address to listen on; 0.0.0.0 for all.
        port: TCP port; 0 takes a free one.
        gpu_memory_utilization: Share of GPU memory vLLM may take; its own default when None.
        tensor_parallel_size: Number of GPUs the weights are split over.
        allowed_local_media_path: Directory that requests may name with file:// URLs; none when
            None.
        dtype: Activation type of what is not quantized; float32 on a CPU is for comparisons.
    """

    video_pruning_rate: float = 0.75
    max_model_len: int | None = None
    max_frames: int = 128
    fps: float = 2.0
    max_images: int = 16
    max_videos: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int = 1
    allowed_local_media_path: Path | None = None
    dtype: str = "bfloat16"

    def faults(self) -> list[Fault]:
        """Everything that is out of its range."""
        checks = [
            (
                0 <= self.video_pruning_rate < 1,
                "video_pruning_rate",
                "0 (off) up to, but without, 1",
            ),
            (
                self.max_model_len is None or self.max_model_len >= 256,
                "max_model_len",
                "256 or more tokens",
            ),
            (self.max_frames >= 1, "max_frames", "1 or more"),
            (self.fps > 0, "fps", "above 0"),
            (self.max_images >= 0, "max_images", "0 or more"),
            (self.max_videos >= 0, "max_videos", "0 or more"),
            (0 <= self.port < 65536, "port", "0 (any free one) to 65535"),
            (
                self.gpu_memory_utilization is None or 0 < self.gpu_memory_utilization <= 1,
                "gpu_memory_utilization",
                "above 0 up to 1",
            ),
            (self.tensor_parallel_size >= 1, "tensor_parallel_size", "1 or more"),
            (
                self.dtype in ("bfloat16", "float16", "float32"),
                "dtype",
                "bfloat16, float16 or float32",
            ),
        ]
        return [
            Fault(name, f"is {getattr(self, name)}", f"allowed: {allowed}")
            for good, name, allowed in checks
            if not good
        ]


@dataclass(frozen=True)
class Served:
    """What hybridquant.json says about serving a directory.

    Attributes:
        settings: The manifest's serve section, laid over the defaults.
        gate_passed: Whether the accuracy gate passed; None when it was not measured or there is no
            manifest.
    """

    settings: ServeSettings
    gate_passed: bool | None


def served(directory: Path, overrides: Mapping[str, Any] | None = None) -> Served:
    """Settings for `directory`: the defaults, over them the manifest's `serve` section, over that
    `overrides`.

    Args:
        directory: A checkpoint, with or without hybridquant.json.
        overrides: Field names and values of `ServeSettings`; a None means "not given".

    Raises:
        BadInput: When the manifest cannot be read, or has settings that it may not have.
    """
    path = directory / MANIFEST
    if not path.exists():
        return Served(_with(ServeSettings(), overrides or {}), None)
    manifest = read_json(path)
    section, gate = manifest.get("serve") or {}, manifest.get("gate") or {}
    if not isinstance(section, dict) or not isinstance(gate, dict):
        raise BadInput(
            Fault(str(path), "serve and gate must be JSON objects", "write the manifest again")
        )
    raise_if_any(
        Fault(
            str(path),
            f"serve.{key} is {value!r}",
            f"a number for one of {', '.join(MANIFEST_KEYS)}",
        )
        for key, value in section.items()
        if key not in MANIFEST_KEYS or not isinstance(value, int | float | None)
    )
    return Served(_with(_with(ServeSettings(), section), overrides or {}), gate.get("passed"))


def _with(settings: ServeSettings, values: Mapping[str, Any]) -> ServeSettings:
    return dataclasses.replace(
        settings, **{key: value for key, value in values.items() if value is not None}
    )
