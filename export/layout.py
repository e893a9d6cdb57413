"""What a quantized directory declares in config.json, and the tensors that follow from it.

The format of a linear is read from `quant_algo`, `quantized_layers` and the exclude list, as vLLM
reads them. The tensors are only compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from checkpoint.config import CheckpointConfig
from checkpoint.family import Family
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.files import TensorFiles
from checkpoint.layout import (
    Linear,
    Specs,
    TensorSpec,
    expected_tensors,
    language_model_linears,
)
from checkpoint.opened import Checkpoint
from export.matching import is_excluded
from quantize.formats.registry import FORMATS, MIXED_PRECISION, UNQUANTIZED, find_format
from quantize.policy import Policy

KV_SCALE = TensorSpec((), "F32")


def quantization_section(config: CheckpointConfig) -> Mapping[str, Any]:
    """Return `quantization_config` of config.json; it is empty for a BF16 checkpoint."""
    section = config.raw.get("quantization_config")
    return section if isinstance(section, dict) else {}


def exclude_entries(section: Mapping[str, Any]) -> list[str]:
    """Return the exclude list of a quantization section, without what is not text."""
    entries = section.get("ignore")
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, str)]


def quantized_layers(section: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the table of formats by linear; None if one `quant_algo` applies to all linears."""
    if str(section.get("quant_algo")).upper() != MIXED_PRECISION:
        return None
    layers = section.get("quantized_layers")
    return layers if isinstance(layers, dict) else {}


def has_kv_scales(section: Mapping[str, Any]) -> bool:
    """Return whether the KV cache is quantized, so that attention has `k_scale` and `v_scale`."""
    return isinstance(section.get("kv_cache_scheme"), dict)


def linear_formats(config: CheckpointConfig) -> dict[str, str]:
    """Return the format of every quantized linear, as vLLM reads it from config.json.

    vLLM consults the exclude list first. A module that it leaves in is quantized by `quant_algo`,
    or, for MIXED_PRECISION, by its entry in `quantized_layers`.

    Raises:
        BadInput: A `quant_algo` is missing or unknown.
    """
    section = quantization_section(config)
    if not section:
        return {}
    entries = exclude_entries(section)
    layers = quantized_layers(section)
    formats = {}
    for linear in language_model_linears(config):
        if is_excluded(config.family.fused_module(linear.name), entries, config.family):
            continue
        algo = section.get("quant_algo")
        if layers is not None:
            if linear.name not in layers:
                continue
            algo = layer_algo(layers[linear.name])
        format = find_format(algo)
        if format is None:
            raise BadInput(unknown_algo(config, f"quant_algo of {linear.name}", algo))
        formats[linear.name] = format.name
    return formats


def layer_algo(entry: object) -> object:
    """Return `quant_algo` of an entry of `quantized_layers`; None if it has none."""
    return entry.get("quant_algo") if isinstance(entry, dict) else None


def unknown_algo(config: CheckpointConfig, name: str, algo: object) -> Fault:
    """Return the fault of a `quant_algo` that no format has."""
    known = ", ".join(format.algo for format in FORMATS.values())
    what = f"{name} is {shortened(algo, 80)}, not one of {known}, {MIXED_PRECISION}"
    return Fault(str(config.directory / "config.json"), what, "export again")


def quantized_layout(
    config: CheckpointConfig, formats: Mapping[str, str], kv_scales: bool
) -> dict[str, TensorSpec]:
    """Return every tensor that a directory with these formats must contain.

    Args:
        config: The checkpoint's configuration.
        formats: Format of every quantized linear.
        kv_scales: Whether attention has `k_scale` and `v_scale`.
    """
    specs = expected_tensors(config)
    for linear in language_model_linears(config):
        format = formats.get(linear.name, UNQUANTIZED)
        if format != UNQUANTIZED:
            del specs[f"{linear.name}.weight"]
            specs.update(packed_specs(linear, format))
        if kv_scales and linear.short in config.family.kv_linears:
            specs[kv_scale_name(linear, config.family)] = KV_SCALE
    return specs


def output_specs(source: Checkpoint, policy: Policy) -> dict[str, TensorSpec]:
    """Return name, shape and dtype of every tensor of the quantized checkpoint, before anything is
    computed.

    Args:
        source: The BF16 checkpoint; optional tensors that it has are carried over.
        policy: Format by linear.
    """
    specs = quantized_layout(source.config, policy.quantized, policy.kv_cache is not None)
    for name in source.config.family.optional_tensors:
        if name in source.tensors:
            specs[name] = source.tensors.specs[name]
    return specs


def packed_specs(linear: Linear, format: str) -> dict[str, TensorSpec]:
    """Return the tensors of a linear in a format by their names on disk."""
    packed = FORMATS[format].tensors(linear.shape)
    return {f"{linear.name}.{suffix}": spec for suffix, spec in packed.items()}


def packed_tensors(tensors: TensorFiles, linear: str, format: str) -> dict[str, torch.Tensor]:
    """Read the tensors of one quantized linear, by suffix."""
    return {suffix: tensors.read(f"{linear}.{suffix}") for suffix in FORMATS[format].suffixes}


def kv_scale_name(linear: Linear, family: Family) -> str:
    """Return `….k_proj.k_scale` or `….v_proj.v_scale`."""
    return f"{linear.name}.{family.kv_linears[linear.short]}"


def format_faults(
    config: CheckpointConfig, formats: Mapping[str, str], found: Specs
) -> Iterator[tuple[str, Fault]]:
    """Compare the tensors of each linear with the format that config.json gives it.

    Args:
        config: The configuration of the exported directory.
        formats: Format of every quantized linear by config.json.
        found: The tensors of the directory.

    Yields:
        Name and fault of each linear whose tensors are exactly those of another format. A linear
        with missing or wrong tensors is not among them: `checkpoint.files.layout_faults` reports
        those one by one.
    """
    section = quantization_section(config)
    entries = exclude_entries(section)
    for linear in language_model_linears(config):
        declared = formats.get(linear.name, UNQUANTIZED)
        actual = formats_of(linear, found, config.family)
        if not actual or declared in actual:
            continue
        module = config.family.fused_module(linear.name)
        if actual == [UNQUANTIZED]:
            what = "has no scales, but vLLM takes it for quantized"
        elif is_excluded(module, entries, config.family):
            what = "is quantized, but vLLM's exclude rule leaves it out"
        else:
            what = f"is {_algos(actual)}, config.json says {_algos([declared])}"
        where = f"{config.directory / 'config.json'}: {linear.name}"
        yield linear.name, Fault(where, what, "fix quantization_config, or export again")


def formats_of(linear: Linear, found: Specs, family: Family) -> list[str]:
    """The formats whose tensors are exactly those found of a linear, `bf16` among them."""
    ignored = family.kv_linears.get(linear.short)
    own = {}
    for name, spec in found.items():
        parent, _, suffix = name.rpartition(".")
        if parent == linear.name and suffix != ignored:
            own[suffix] = spec
    if own == {"weight": TensorSpec(linear.shape)}:
        return [UNQUANTIZED]
    return [format.name for format in FORMATS.values() if format.tensors(linear.shape) == own]


def _algos(formats: list[str]) -> str:
    algos = []
    for format in formats:
        algos.append("BF16" if format == UNQUANTIZED else FORMATS[format].algo)
    return " or ".join(algos)
