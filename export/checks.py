"""The checks of an exported directory, in their order: config files, layout, values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from checkpoint.companions import companion_faults
from checkpoint.config import read_config
from checkpoint.faults import BadInput, Fault
from checkpoint.files import TensorFiles, layout_faults
from checkpoint.layout import Specs
from checkpoint.opened import Checkpoint, open_checkpoint
from export.layout import (
    format_faults,
    has_kv_scales,
    linear_formats,
    quantization_section,
    quantized_layout,
)
from export.manifest import recorded_section
from export.section import section_faults
from export.weights import ValueCheck, fused_scale_faults, kv_scale_faults
from quantize.algorithms import ALGORITHMS, Change


def directory_faults(directory: Path, source: Path | None) -> list[Fault]:
    """Return every fault of an exported directory; `export.verify.verify` describes the arguments
    and what is raised.
    """
    config = read_config(directory)
    original = None
    if source is not None:
        original = open_checkpoint(source)
    faults = list(_companion_faults(directory, original))
    try:
        tensors = TensorFiles(directory)
    except BadInput as bad:
        return [*faults, *bad.faults]
    exported = Checkpoint(config, tensors)
    faults += section_faults(config)
    if original is not None and original.layout != exported.layout:
        what = "describes a model of other dimensions"
        faults.append(Fault(str(source), what, "is this the right --source?"))
        original = None
    try:
        formats = linear_formats(config)
    except BadInput:  # section_faults has reported the same
        return faults
    if not quantization_section(config):
        return faults
    wrong_layout = list(_layout_faults(exported, formats))
    faults += wrong_layout
    if not wrong_layout:  # with tensors missing or mis-shaped there is nothing to compare
        faults += _value_faults(exported, formats, original)
    return faults


def _companion_faults(directory: Path, original: Checkpoint | None) -> Iterator[Fault]:
    """Yield one fault for each file beside the weights that is broken or not the source's."""
    broken = set()
    for fault in companion_faults(directory):
        yield fault
        broken.add(fault.where)
    if original is None:
        return
    for fault in original.companions.copy_faults(directory):
        if fault.where not in broken:
            yield fault


def _layout_faults(exported: Checkpoint, formats: Mapping[str, str]) -> Iterator[Fault]:
    """Yield one fault for each linear of another format, and one for each other wrong tensor."""
    found = exported.tensors.specs
    kv_scales = has_kv_scales(quantization_section(exported.config))
    expected: Specs = quantized_layout(exported.config, formats, kv_scales)
    others = set()
    for linear, fault in format_faults(exported.config, formats, found):
        yield fault
        others.add(linear)
    found = {name: spec for name, spec in found.items() if _owner(name) not in others}
    expected = {name: spec for name, spec in expected.items() if _owner(name) not in others}
    optional = exported.config.family.optional_tensors
    yield from layout_faults(found, expected, str(exported.directory), optional)


def _owner(tensor: str) -> str:
    """The module that a tensor belongs to."""
    return tensor.rpartition(".")[0]


def _value_faults(
    exported: Checkpoint, formats: Mapping[str, str], original: Checkpoint | None
) -> Iterator[Fault]:
    source = None if original is None else original.tensors
    trained = trained_tensors(exported.directory)
    change = weight_change(exported.directory)
    yield from ValueCheck(exported, formats, source, trained, change).faults()
    yield from fused_scale_faults(exported, formats)
    if has_kv_scales(quantization_section(exported.config)):
        yield from kv_scale_faults(exported)


def trained_tensors(directory: Path) -> frozenset[str]:
    """Return the tensors that a distillation has moved away from the source, by the
    directory's own manifest.
    """
    named = recorded_section(directory, "distillation").get("trained")
    if not isinstance(named, list):
        return frozenset()
    return frozenset(name for name in named if isinstance(name, str))


def weight_change(directory: Path) -> Change:
    """Return what the calibration algorithm may have done to weights, by the manifest.

    Only rounding is allowed where the manifest names no algorithm.
    """
    section = recorded_section(directory, "recipe").get("quantize")
    name = section.get("algorithm") if isinstance(section, dict) else None
    if not isinstance(name, str) or name not in ALGORITHMS:
        return "rounded"
    return ALGORITHMS[name].change
