"""What a distillation leaves on disk while it runs, each piece written beside its name and renamed
when it is whole.

.NAME.qad/run.json              what the run must agree with to be taken up again
.NAME.qad/checkpoint-N/         weights, optimizer, schedule, random states, position in the samples
.NAME.qad/best.safetensors      the weights with the lowest held-out KL so far
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from checkpoint.config import read_json
from checkpoint.faults import Fault

WEIGHTS = "trained.safetensors"
BEST = "best.safetensors"
_RUN = "run.json"


def identity_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as dotted names with JSON's values, so that a difference can be named."""

    def leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))
        else:
            yield prefix, json.loads(json.dumps(value, default=str))

    return dict(leaves(parts, ""))


def stamp(path: Path) -> list[int]:
    """Size in bytes and time of change in ns, which tell whether a file is another; empty where
    there is none.
    """
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else []


def state_faults(directory: Path, identity: Mapping[str, Any]) -> Iterator[Fault]:
    """Every difference between this run and the one whose state is in `directory`; none where there
    is no state.
    """
    if not (directory / _RUN).exists():
        return
    before = read_json(directory / _RUN)
    remedy = f"go back to it to take the run up again, or remove {directory} to start anew"
    for name in sorted({*before, *identity}):
        if before.get(name) != identity.get(name):
            yield Fault(
                name,
                f"was {before.get(name)} when {directory} was begun, is {identity.get(name)}",
                remedy,
            )


def state_bytes(weights: int, sharded: int = 0) -> int:
    """Bytes of a state at its largest: while a checkpoint is written beside the one before it.

    Args:
        weights: Number of weights that train. A checkpoint has them and AdamW's two moments in
            float32; the best weights are kept apart.
        sharded: Bytes of the BF16 language model where several processes share it: FSDP's
            checkpoints hold all of it, the trained weights in float32.
    """
    checkpoint = weights * (4 + 8) + (sharded + 2 * weights if sharded else 0)
    return 2 * checkpoint + 4 * weights


def space_faults(directory: Path, needed: int) -> Iterator[Fault]:
    """A fault when the disk cannot hold a state of `needed` bytes, what an earlier run has left
    there included.
    """
    there = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    free = shutil.disk_usage(
        next(parent for parent in directory.absolute().parents if parent.exists())
    ).free
    if free + there < needed * 1.02 + 2**20:
        what = f"the state needs {needed / 1e9:.2f} GB while it runs, {(free + there) / 1e9:.2f} GB are free"
        yield Fault(str(directory), what, "free some space, or give an output on another disk")


def begin(directory: Path, identity: Mapping[str, Any]) -> None:
    """Make the directory and write down what it belongs to."""
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / _RUN, json.dumps(dict(identity), indent=2) + "\n")


def end(directory: Path) -> None:
    """Remove a state; a kill leaves it whole or not there."""
    removed = directory.with_name(directory.name + ".removed")
    shutil.rmtree(removed, ignore_errors=True)
    if directory.exists():
        directory.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(
        directory.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])
    )


def amax_of(linears: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Ranges of the linears' quantizers by name; they are buffers, so neither optimizer nor FSDP
    touches them.
    """
    return {
        f"{name}.{quantizer}._amax": getattr(module, quantizer)._amax.detach()
        for name, module in linears.items()
        for quantizer in ("weight_quantizer", "input_quantizer")
    }


@torch.no_grad()
def share_ranges(model: nn.Module) -> None:
    """Give every process the first one's ranges: each has calibrated for itself, and their GPUs may
    differ in a bit.
    """
    if dist.is_initialized():
        for name, buffer in model.named_buffers():
            if name.endswith("_amax"):
                dist.broadcast(buffer, 0)


def weight_of(linear: nn.Module) -> nn.Parameter:
    """The parameter itself: `.weight` is an attribute of ModelOpt's, quantized while the linear
    runs.
    """
    parameter = linear._parameters["weight"]
    assert parameter is not None
    return parameter


def save_weights(linears: Mapping[str, nn.Module], path: Path, step: int, here: bool) -> None:
    """Write the float32 weights of the trained linears and the ranges of their quantizers.

    Args:
        linears: By checkpoint name, whole or sharded; every process must call this, for each holds
            a part.
        path: The file.
        step: The step they are of.
        here: Whether this is the process that writes.
    """
    state = {}
    for name, module in linears.items():
        weight = whole(weight_of(module).detach())
        if here:
            state[f"{name}.weight"] = weight.cpu()
    if here:
        state |= {name: amax.cpu() for name, amax in amax_of(linears).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        save_file(state, partial, metadata={"step": str(step)})
        flush(partial)
        os.replace(partial, path)


@torch.no_grad()
def load_weights(linears: Mapping[str, nn.Module], path: Path) -> int:
    """Load what `save_weights` wrote into whole or sharded linears; returns the step it is of."""
    with safe_open(path, framework="pt") as file:
        for name, module in linears.items():
            weight = weight_of(module)
            full: torch.Tensor = file.get_tensor(f"{name}.weight").to(weight.device)
            if isinstance(weight, DTensor):
                full = distribute_tensor(full, weight.device_mesh, weight.placements)
            weight.copy_(full)
        step = int(file.metadata()["step"])
    load_ranges(linears, path)
    return step


@torch.no_grad()
def load_ranges(linears: Mapping[str, nn.Module], path: Path) -> None:
    """Load the ranges alone of what `save_weights` wrote."""
    with safe_open(path, framework="pt") as file:
        for name, amax in amax_of(linears).items():
            amax.copy_(file.get_tensor(name))


@torch.no_grad()
def gather(model: nn.Module, here: bool) -> None:
    """Make a sharded model whole again, on the CPU of the process that exports; the others only
    take part.
    """
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                full = whole(parameter).cpu()
                if here:
                    module._parameters[key] = nn.Parameter(full, requires_grad=False)
    if here and isinstance(model, FSDPModule):
        # Not model.to("cpu"): FSDP2's hook in it looks for the shards that are no longer there.
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    tensor.data = tensor.data.cpu()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all of it where this process holds a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_text(path: Path, text: str) -> None:
    """Write a small file that is whole or not there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    os.replace(partial, path)


def flush(path: Path) -> None:
    """Bring a file, or all files of a directory, onto the disk before they are renamed."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
