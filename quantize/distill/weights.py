"""Weights that train, and the quantizer ranges beside them: saved, loaded, shared by processes, and
made whole again after sharding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from modelopt.torch.quantization.nn import TensorQuantizer
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import parametrize

from checkpoint.atomic import write_tensors
from checkpoint.processes import Processes

Linears = Mapping[str, nn.Module]
"""Quantized linears by checkpoint name."""


@dataclass(frozen=True)
class Weight:
    """A weight that trains.

    Attributes:
        module: The module that it belongs to.
        key: Its name there.
    """

    module: nn.Module
    key: str

    @property
    def is_rounded(self) -> bool:
        """Whether its module computes with a rounded copy: see `quantize.distill.student`."""
        return parametrize.is_parametrized(self.module, self.key)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, as it is now: FSDP replaces parameters.

        ModelOpt's `linear.weight` is computed, and quantized while the linear runs.
        """
        owner: Any = self.module
        key = self.key
        if self.is_rounded:
            owner = owner.parametrizations[key]
            key = "original"
        return dict(owner.named_parameters(recurse=False))[key]


@dataclass(frozen=True)
class Trained:
    """What trains.

    Attributes:
        weights: By name in the checkpoint.
        linears: The quantized linears among their modules.
    """

    weights: Mapping[str, Weight]
    linears: Linears


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


def save_weights(trained: Trained, path: Path, step: int, processes: Processes) -> None:
    """Write the float32 weights that train and the ranges of their quantizers.

    Every process must call this, because each holds a part of sharded weights.

    Args:
        trained: Whole or sharded.
        path: The safetensors file.
        step: The optimizer step that they are from.
        processes: The first one writes.
    """
    tensors = {}
    for name, weight in trained.weights.items():
        values = whole(weight.parameter.detach())
        if processes.is_first:
            tensors[name] = values.cpu()
    if processes.is_first:
        for name, amax in ranges_of(trained.linears).items():
            tensors[name] = amax.cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"step": str(step)})
    processes.wait()


@torch.no_grad()
def load_weights(trained: Trained, path: Path) -> int:
    """Load what `save_weights` wrote into whole or sharded weights.

    Returns:
        The step that the weights are from.
    """
    with safe_open(path, framework="pt") as file:
        for name, weight in trained.weights.items():
            parameter: Any = weight.parameter
            loaded: torch.Tensor = file.get_tensor(name).to(parameter.device)
            if isinstance(parameter, DTensor):
                loaded = distribute_tensor(loaded, parameter.device_mesh, parameter.placements)
            parameter.copy_(loaded)
        step = int(file.metadata()["step"])
    load_ranges(trained.linears, path)
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
