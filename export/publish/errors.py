"""Measures how far each quantized weight is from its BF16 source."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint.faults import BadInput, Fault
from checkpoint.files import in_threads
from checkpoint.opened import open_checkpoint
from export.layout import linear_formats, packed_tensors
from quantize.formats.registry import FORMATS

_PART = 1 << 22
"""Weights compared at once: 16 MB in float32."""


def weight_errors(directory: Path, source: Path) -> dict[str, float]:
    """Return ‖quantized − BF16‖ / ‖BF16‖ of every quantized linear's weight.

    Args:
        directory: An exported directory.
        source: The BF16 checkpoint that it was made from.

    Raises:
        BadInput: One of them is not a checkpoint, or the source lacks a weight.
    """
    exported = open_checkpoint(directory)
    original = open_checkpoint(source)
    formats = linear_formats(exported.config)

    def measure(linear: str) -> tuple[str, float]:
        name = f"{linear}.weight"
        if name not in original.tensors:
            raise BadInput(Fault(str(source), f"tensor {name} is missing", "is this the source?"))
        weight = original.tensors.read(name)
        packed = packed_tensors(exported.tensors, linear, formats[linear])
        step = max(1, _PART // weight.shape[1])
        lost = 0.0
        total = 0.0
        for start in range(0, len(weight), step):
            part = {}
            for suffix, tensor in packed.items():
                part[suffix] = tensor[start : start + step] if tensor.dim() else tensor
            unpacked = FORMATS[formats[linear]].unpack(part)
            exact = weight[start : start + step].float()
            if unpacked.shape != exact.shape:
                what = f"{name} has another shape there"
                raise BadInput(Fault(str(source), what, "is this the source?"))
            lost += float((unpacked - exact).square().sum(dtype=torch.float64))
            total += float(exact.square().sum(dtype=torch.float64))
        return linear, math.sqrt(lost / total) if total else 0.0

    names = tqdm(formats, desc="comparing weights", unit="tensor", leave=False, disable=None)
    return dict(in_threads(measure, names))
