"""Weights and quantizer ranges of the linears that train: saved, loaded, shared by processes, and
made whole again after sharding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from modelopt.torch.quantization.nn import TensorQuantizer
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from checkpoint.atomic import write_tensors
from checkpoint.processes import Processes

Linears = Mapping[str, nn.Module]
"""Quantized linears by checkpoint name."""


def enabled_quantizers(module: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Yield every enabled quantizer in a module with its name there.

    A linear of a weight-only format has no enabled input quantizer.
    """
    for name, part in module.named_modules():
        if isinstance(part, TensorQuantizer) and part.is_enabled:
            yield name, part


def ranges_of(linears: Linears) -> dict[str, torch.Tensor]:
    """Return the ranges of the linears' quantizers, by name: the tensors themselves, not copies.

    They are buffers, so neither the optimizer nor FSDP touches them.
    """
    ranges = {}
    for name, linear in linears.items():
        for quantizer_name, quantizer in enabled_quantizers(linear):
            if quantizer.amax is not None:
                ranges[f"{name}.{quantizer_name}.amax"] = quantizer.amax.detach()
    return ranges


@torch.no_grad()
def share_ranges(model: nn.Module, processes: Processes) -> None:
    """Give every process the first one's ranges: each has calibrated for itself, and their GPUs may
    differ in a bit.
    """
    if processes.count == 1:
        return
    for _, quantizer in enabled_quantizers(model):
        if quantizer.amax is not None:
            dist.broadcast(quantizer.amax, 0)


def weight_of(linear: nn.Module) -> nn.Parameter:
    """Return the parameter itself.

    ModelOpt's `linear.weight` is computed, and quantized while the linear runs.
    """
    return dict(linear.named_parameters(recurse=False))["weight"]


def save_weights(linears: Linears, path: Path, step: int, processes: Processes) -> None:
    """Write the float32 weights of the linears and the ranges of their quantizers.

    Every process must call this, because each holds a part of sharded weights.

    Args:
        linears: Whole or sharded.
        path: The safetensors file.
        step: The optimizer step that they are from.
        processes: The first one writes.
    """
    tensors = {}
    for name, linear in linears.items():
        weight = whole(weight_of(linear).detach())
        if processes.is_first:
            tensors[f"{name}.weight"] = weight.cpu()
    if processes.is_first:
        for name, amax in ranges_of(linears).items():
            tensors[name] = amax.cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"step": str(step)})
    processes.wait()


@torch.no_grad()
def load_weights(linears: Linears, path: Path) -> int:
    """Load what `save_weights` wrote into whole or sharded linears.

    Returns:
        The step that the weights are from.
    """
    with safe_open(path, framework="pt") as file:
        for name, linear in linears.items():
            weight = weight_of(linear)
            loaded: torch.Tensor = file.get_tensor(f"{name}.weight").to(weight.device)
            if isinstance(weight, DTensor):
                loaded = distribute_tensor(loaded, weight.device_mesh, weight.placements)
            weight.copy_(loaded)
        step = int(file.metadata()["step"])
    load_ranges(linears, path)
    return step


@torch.no_grad()
def load_ranges(linears: Linears, path: Path) -> None:
    """Load only the ranges that `save_weights` wrote."""
    with safe_open(path, framework="pt") as file:
        for name, amax in ranges_of(linears).items():
            amax.copy_(file.get_tensor(name))


@torch.no_grad()
def gather_model(model: nn.Module, processes: Processes) -> None:
    """Make a sharded model whole again, on the CPU of the first process.

    Every process must call this, because each holds a part. A model that is not sharded stays as
    it is.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                full = whole(parameter).cpu()
                if processes.is_first:
                    module.register_parameter(name, nn.Parameter(full, requires_grad=False))
    if processes.is_first and isinstance(model, FSDPModule):
        # Trap: FSDP2's hook in `model.to("cpu")` looks for the shards, which are no longer there.
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            tensor.data = tensor.data.cpu()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself, or all of it if this process holds a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
