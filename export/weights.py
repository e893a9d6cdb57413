"""Checks the values of an exported directory: finite, with sound scales, and near their source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm

from checkpoint.faults import Fault
from checkpoint.files import TensorFiles, all_finite, in_threads
from checkpoint.layout import Linear
from checkpoint.opened import Checkpoint
from export.closeness import elements_beyond, tensor_faults
from export.layout import kv_scale_name, packed_tensors
from quantize.algorithms import Change
from quantize.formats.registry import FORMATS, Tensors

_REWRITE = "export again"
_WRONG_SOURCE = "is this the right --source?"
_NOT_FINITE = "contains NaN or infinite values"
_PART = {"cpu": 1 << 18, "cuda": 1 << 23}
"""Weights compared at once: what fits into a CPU's cache, and what keeps a GPU busy. At 1 << 26,
NVFP4 of the 12B took 18 GB of GPU memory."""


@dataclass(frozen=True)
class ValueCheck:
    """The check of all values of one directory, whose layout is already known to be right.

    Attributes:
        exported: The quantized checkpoint.
        formats: Format of every quantized linear.
        source: The tensors of the BF16 checkpoint; None to leave out the comparison.
        trained: Tensors that a distillation has moved away from the source.
        change: What the calibration algorithm may have done to weights.
    """

    exported: Checkpoint
    formats: Mapping[str, str]
    source: TensorFiles | None
    trained: frozenset[str]
    change: Change

    def faults(self) -> Iterator[Fault]:
        """Yield every fault, in the order of the model. Reads each tensor once, in threads."""
        names = list(self.exported.layout)
        shown = tqdm(names, desc="verifying", unit="tensor", leave=False, disable=None)
        for faults in in_threads(self._check, shown):
            yield from faults

    def _check(self, name: str) -> list[Fault]:
        linear = name.removesuffix(".weight")
        if linear in self.formats:
            return list(self._quantized_faults(linear))
        return list(self._unquantized_faults(name))

    def _unquantized_faults(self, name: str) -> Iterator[Fault]:
        tensor = self.exported.tensors.read(name)
        if tensor.is_floating_point() and not all_finite(tensor):
            yield Fault(name, _NOT_FINITE, _REWRITE)
        if self.source is None:
            return
        if self.source.specs.get(name) != self.exported.tensors.specs[name]:
            yield Fault(name, "is not in the source, or has another shape there", _WRONG_SOURCE)
        elif name in self.trained:
            return
        elif not torch.equal(_bits(tensor), _bits(self.source.read(name))):
            yield Fault(name, "differs from the source, though it is not quantized", _REWRITE)

    def _quantized_faults(self, linear: str) -> Iterator[Fault]:
        format = self.formats[linear]
        packed = packed_tensors(self.exported.tensors, linear, format)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        packed = {suffix: tensor.to(device) for suffix, tensor in packed.items()}
        bad_scales: list[Fault] = []
        for suffix, tensor in packed.items():
            if suffix != "weight":
                bad_scales += scale_faults(f"{linear}.{suffix}", tensor)
        if bad_scales:
            yield from bad_scales
            return
        source = self.source
        if f"{linear}.weight" in self.trained:
            source = None
        if source is None:
            yield from self._weight_faults(linear, packed, None)
            return
        spec = source.specs.get(f"{linear}.weight")
        columns = FORMATS[format].unpack(_rows(packed, 0, 1)).shape[1]
        if spec is None or spec.shape != (len(packed["weight"]), columns):
            what = "is not in the source, or has another shape there"
            yield Fault(f"{linear}.weight", what, _WRONG_SOURCE)
            return
        weight = source.read(f"{linear}.weight").to(device)
        yield from self._weight_faults(linear, packed, weight)

    def _weight_faults(
        self, linear: str, packed: Tensors, weight: torch.Tensor | None
    ) -> Iterator[Fault]:
        """Compare a packed weight with its source, in parts: never the whole in float32.

        Args:
            linear: Its checkpoint name.
            packed: Its tensors.
            weight: The source's, BF16 [out, in]; None for a check without a source.
        """
        name = f"{linear}.weight"
        format = self.formats[linear]
        rows, columns = packed["weight"].shape
        step = max(1, _PART[packed["weight"].device.type] // columns)
        beyond = 0
        finite = True
        unpacked_parts = []
        for start in range(0, rows, step):
            part = _rows(packed, start, start + step)
            unpacked = FORMATS[format].unpack(part)
            finite = finite and all_finite(unpacked)
            if weight is not None:
                exact = weight[start : start + step].float()
                beyond += elements_beyond(exact, unpacked, part, format, self.change)
                if self.change != "rounded":
                    unpacked_parts.append(unpacked)
        if not finite:
            yield Fault(name, _NOT_FINITE, _REWRITE)
        elif weight is not None and beyond:
            share = f"{beyond / weight.numel():.2%} of the weights"
            what = f"{share} are further from the source than {format} rounding allows"
            yield Fault(name, what, f"{_WRONG_SOURCE} else {_REWRITE}")
        elif weight is not None and unpacked_parts:
            whole = torch.cat(unpacked_parts)
            yield from tensor_faults(name, weight.float(), whole, format, self.change)


def fused_scale_faults(exported: Checkpoint, formats: Mapping[str, str]) -> Iterator[Fault]:
    """Yield a fault for each scale that differs between linears that vLLM fuses into one module."""
    family = exported.config.family
    fused: dict[str, list[Linear]] = {}
    for linear in exported.linears:
        if linear.name in formats and family.fused_parts(linear.short):
            fused.setdefault(family.fused_module(linear.name), []).append(linear)
    for linears in fused.values():
        for suffix in FORMATS[formats[linears[0].name]].fused_scales:
            values = {}
            for linear in linears:
                values[linear.short] = float(exported.tensors.read(f"{linear.name}.{suffix}"))
            if len(set(values.values())) > 1:
                what = f"differs between {values}, and vLLM fuses them under one"
                yield Fault(f"{linears[0].mixer} {suffix}", what, _REWRITE)


def kv_scale_faults(exported: Checkpoint) -> Iterator[Fault]:
    """Yield a fault for each KV cache scale that is not finite and positive."""
    family = exported.config.family
    for linear in exported.linears:
        if linear.short in family.kv_linears:
            name = kv_scale_name(linear, family)
            yield from scale_faults(name, exported.tensors.read(name))


def scale_faults(name: str, scale: torch.Tensor) -> Iterator[Fault]:
    """Yield a fault if a scale has values that are not finite and positive."""
    values = scale.float()
    sound = torch.isfinite(values) & (values > 0)
    if not bool(sound.all()):
        count = int((~sound).sum())
        what = f"has {count} values that are zero, negative or not finite"
        yield Fault(name, what, "calibrate and export again")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A view that compares equal where the bits are equal: NaN would not."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _rows(packed: Tensors, start: int, end: int) -> dict[str, torch.Tensor]:
    """Some rows of a packed linear; scalar scales apply to all of them."""
    part = {}
    for suffix, tensor in packed.items():
        part[suffix] = tensor[start:end] if tensor.dim() > 0 else tensor
    return part
