"""Checks scales by themselves: finite and positive, equal where vLLM fuses linears, and not far
from the others of their kind.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

import torch

from checkpoint.faults import Fault
from checkpoint.layout import Linear
from checkpoint.opened import Checkpoint
from export.layout import has_kv_scales, kv_scale_name, quantization_section
from quantize.formats.registry import FORMATS

_REWRITE = "export again"
_CALIBRATE = "calibrate and export again"

_E4M3_MAX = 448.0
_KV_RANGE = (1e-2, 1e4)
"""Largest key or value that a KV cache scale may stand for. Keys of language models reach a few
hundred."""
_INPUT_RANGE = (1e-3, 1e6)
"""The same for the input of a linear. Behind ReLU², inputs reach some ten thousand."""
_KV_SPREAD = 100.0
_INPUT_SPREAD = 1000.0
"""How many times as large or small as the median of its kind a range may be."""


def is_sound(scale: torch.Tensor) -> bool:
    """Whether all values of a scale are finite and positive."""
    values = scale.float()
    return bool((torch.isfinite(values) & (values > 0)).all())


def scale_faults(where: str, scale: torch.Tensor) -> Iterator[Fault]:
    """Yield a fault if a scale has values that are not finite and positive."""
    if is_sound(scale):
        return
    values = scale.float()
    count = int((~(torch.isfinite(values) & (values > 0))).sum())
    what = f"has {count} values that are zero, negative or not finite"
    yield Fault(where, what, _CALIBRATE)


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
                file = exported.tensors.location[f"{linears[0].name}.{suffix}"]
                where = f"{exported.directory / file}: {linears[0].mixer} {suffix}"
                what = f"differs between {values}, and vLLM fuses them under one"
                yield Fault(where, what, _REWRITE)


def range_faults(exported: Checkpoint, formats: Mapping[str, str]) -> Iterator[Fault]:
    """Yield a fault for each input range and KV cache range that no calibration finds.

    The bounds are wide: they hold for every model, and find a scale that is wrong by orders of
    magnitude. `export.input_ranges` compares with what the source really has.
    """
    ranges: dict[str, dict[str, float]] = {}
    for linear in exported.linears:
        format = FORMATS[formats[linear.name]] if linear.name in formats else None
        if format is not None and format.input_amax is not None:
            name = f"{linear.name}.input_scale"
            amax = float(format.input_amax(exported.tensors.read(name)))
            ranges.setdefault(f"input of {linear.short}", {})[name] = amax
    for kind, found in ranges.items():
        yield from _far_out(exported, kind, found, _INPUT_RANGE, _INPUT_SPREAD)
    if has_kv_scales(quantization_section(exported.config)):
        yield from _kv_faults(exported)


def _kv_faults(exported: Checkpoint) -> Iterator[Fault]:
    family = exported.config.family
    ranges: dict[str, dict[str, float]] = {}
    for linear in exported.linears:
        if linear.short not in family.kv_linears:
            continue
        name = kv_scale_name(linear, family)
        amax = float(exported.tensors.read(name)) * _E4M3_MAX
        ranges.setdefault(f"output of {linear.short}", {})[name] = amax
    for kind, found in ranges.items():
        yield from _far_out(exported, kind, found, _KV_RANGE, _KV_SPREAD)


def _far_out(
    exported: Checkpoint,
    kind: str,
    ranges: Mapping[str, float],
    allowed: tuple[float, float],
    spread: float,
) -> Iterator[Fault]:
    """Yield the ranges, by name of their scale, that are not those of an `{kind}`."""
    # Zero, negative and NaN are reported where values are checked.
    sound = [amax for amax in ranges.values() if amax > 0]
    if not sound:
        return
    # Of two, the lower: one that is far above is then found.
    median = statistics.median_low(sound)
    low = max(allowed[0], median / spread)
    high = min(allowed[1], median * spread)
    for name, amax in ranges.items():
        if amax > 0 and not low <= amax <= high:
            what = f"stands for a largest {kind} of {amax:.3g}, expected is {low:.3g} to {high:.3g}"
            yield Fault(exported.tensors.where(name), what, _CALIBRATE)
