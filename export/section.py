"""Checks `quantization_config` of config.json and hf_quant_config.json against vLLM's rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

from checkpoint.config import CheckpointConfig, read_json
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.layout import Linear, language_model_linears
from export.layout import (
    exclude_entries,
    layer_algo,
    quantization_section,
    quantized_layers,
    unknown_algo,
)
from export.matching import is_excluded
from quantize.formats.registry import MIXED_PRECISION, find_format

FP8_KV_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}
"""The one `kv_cache_scheme` with scales that vLLM loads."""

_REMEDY = "export again"
_FIX_IGNORE = "fix `ignore`, or export again"


def section_faults(config: CheckpointConfig) -> Iterator[Fault]:
    """Yield what is wrong with the two config files, without looking at the tensors."""
    where = str(config.directory / "config.json")
    section = quantization_section(config)
    if not section:
        yield Fault(where, "has no quantization_config, so vLLM serves BF16", _REMEDY)
        return
    method = section.get("quant_method")
    if method != "modelopt":
        yield Fault(where, f"quant_method is {shortened(method, 80)!r}, not 'modelopt'", _REMEDY)
    algo = section.get("quant_algo")
    if find_format(algo) is None and str(algo).upper() != MIXED_PRECISION:
        yield unknown_algo(config, "quant_algo", algo)
    yield from _entry_faults(section, where)
    yield from _read_otherwise_faults(config, section, where)
    yield from _layer_faults(config, section, where)
    yield from _legacy_faults(config, section)
    yield from _excluded_module_faults(config, section)
    yield from _fusion_faults(config, section)


def _entry_faults(section: Mapping[str, Any], where: str) -> Iterator[Fault]:
    entries = section.get("ignore", [])
    if not isinstance(entries, list):
        what = f"ignore is {shortened(repr(entries), 60)}, not a list, which vLLM refuses"
        yield Fault(where, what, _FIX_IGNORE)
        return
    for entry in entries:
        if not isinstance(entry, str) or not entry or not entry.isprintable():
            # ModelOpt 0.47's exporter appends "\0backbone.pt_name_sentinel" to every entry of this
            # model, so that vLLM excludes nothing.
            what = f"ignore entry {shortened(entry, 80)!r} is not a module name"
            yield Fault(where, what, "export.repair, or export again")


def _read_otherwise_faults(
    config: CheckpointConfig, section: Mapping[str, Any], where: str
) -> Iterator[Fault]:
    """Check the keys that make vLLM read the section, or frames and KV cache, in another way."""
    if not (config.raw.get("torch_dtype") or config.raw.get("dtype")):
        what = "torch_dtype is missing: without it vLLM carries frames as float32"
        yield Fault(where, what, 'add "torch_dtype": "bfloat16" at the top')
    if "quantization" in section:
        what = "quantization_config.quantization makes vLLM ignore the keys beside it"
        yield Fault(where, what, "remove it")
    scheme = section.get("kv_cache_scheme")
    if scheme is not None and scheme != FP8_KV_CACHE:
        what = f"kv_cache_scheme is {shortened(scheme, 120)}, vLLM reads only {FP8_KV_CACHE}"
        yield Fault(where, what, _REMEDY)
    format = find_format(section.get("quant_algo"))
    size = section.get("group_size")
    if size is not None and format is not None and size != format.group_size:
        what = f"group_size is {shortened(size, 60)}, {format.algo} has {format.group_size}"
        yield Fault(where, what, _REMEDY)


def _layer_faults(
    config: CheckpointConfig, section: Mapping[str, Any], where: str
) -> Iterator[Fault]:
    """Check the entries of `quantized_layers`."""
    layers = quantized_layers(section)
    if layers is None:
        return
    if not layers:
        yield Fault(where, f"{MIXED_PRECISION} without quantized_layers", _REMEDY)
    entries = exclude_entries(section)
    names = {linear.name for linear in language_model_linears(config)}
    for name, entry in layers.items():
        if name not in names:
            what = f"quantized_layers names {shortened(name)}, which is not a linear of this model"
            yield Fault(where, what, _REMEDY)
            continue
        if is_excluded(config.family.fused_module(name), entries, config.family):
            what = f"quantized_layers names {name}, which vLLM's exclude rule leaves out"
            yield Fault(where, what, _FIX_IGNORE)
        format = find_format(layer_algo(entry))
        if format is None:
            yield unknown_algo(config, f"quant_algo of {name}", layer_algo(entry))
        elif entry.get("group_size") != format.group_size:
            found = shortened(entry.get("group_size"), 60)
            what = f"group_size of {name} is {found}, {format.algo} has {format.group_size}"
            yield Fault(where, what, _REMEDY)


def _legacy_faults(config: CheckpointConfig, section: Mapping[str, Any]) -> Iterator[Fault]:
    """Check that hf_quant_config.json says the same as config.json."""
    path = config.directory / "hf_quant_config.json"
    try:
        content = read_json(path)
    except BadInput as bad:
        yield from bad.faults
        return
    legacy = content.get("quantization")
    if not isinstance(legacy, dict):
        yield Fault(str(path), "quantization is missing, or not an object", _REMEDY)
        return
    algo = section.get("quant_algo")
    if legacy.get("quant_algo") != algo:
        yield Fault(str(path), "quant_algo differs from quant_algo in config.json", _REMEDY)
    if legacy.get("exclude_modules") != section.get("ignore", []):
        yield Fault(str(path), "exclude_modules differs from ignore in config.json", _REMEDY)
    format = find_format(algo)
    if format is not None and legacy.get("group_size") != format.group_size:
        found = shortened(legacy.get("group_size"), 60)
        what = f"group_size is {found}, {format.algo} has {format.group_size}"
        yield Fault(str(path), what, _REMEDY)
    kv_cache = "FP8" if section.get("kv_cache_scheme") is not None else None
    if legacy.get("kv_cache_quant_algo") != kv_cache:
        found = shortened(legacy.get("kv_cache_quant_algo"), 60)
        what = f"kv_cache_quant_algo is {found}, by kv_cache_scheme in config.json it is {kv_cache}"
        yield Fault(str(path), what, _REMEDY)
    if legacy.get("quantized_layers") != section.get("quantized_layers"):
        yield Fault(str(path), "quantized_layers differs from that in config.json", _REMEDY)
    yield from _group_faults(config, section, content)


def _group_faults(
    config: CheckpointConfig, section: Mapping[str, Any], legacy: dict[str, Any]
) -> Iterator[Fault]:
    """Check `config_groups`, which vLLM does not read and other programs do."""
    groups = section.get("config_groups")
    if groups is None or legacy["quantization"].get("quant_algo") != section.get("quant_algo"):
        return
    try:
        expected = convert_hf_quant_config_format(legacy).get("config_groups")
    except (AttributeError, KeyError, TypeError):
        return  # entries that are not objects, which are reported elsewhere
    if groups != expected:
        what = "config_groups is not what the other keys of quantization_config say"
        yield Fault(str(config.directory / "config.json"), what, _REMEDY)


def _excluded_module_faults(
    config: CheckpointConfig, section: Mapping[str, Any]
) -> Iterator[Fault]:
    """Check the modules that vLLM gives the quantization config to and that never have scales."""
    if quantized_layers(section) is not None:  # then only what the table names is quantized
        return
    entries = exclude_entries(section)
    family = config.family
    modules = [family.vllm_module(family.lm_head)]
    for layer in range(config.depth):
        if config.mixer_kind(layer) == "mamba":
            modules.append(family.vllm_module(f"{family.layer_prefix(layer)}mixer.conv1d"))
    where = config.directory / "config.json"
    for module in modules:
        if not is_excluded(module, entries, family):
            what = "has no scales, but vLLM takes it for quantized"
            yield Fault(f"{where}: ignore: {module}", what, _FIX_IGNORE)


def _fusion_faults(config: CheckpointConfig, section: Mapping[str, Any]) -> Iterator[Fault]:
    """Check that linears that vLLM fuses have one entry in `quantized_layers`."""
    layers = quantized_layers(section)
    if layers is None:
        return
    fused: dict[str, list[Linear]] = {}
    for linear in language_model_linears(config):
        if config.family.fused_parts(linear.short):
            fused.setdefault(config.family.fused_module(linear.name), []).append(linear)
    for parts in fused.values():
        algos = {str(layer_algo(layers.get(linear.name))).upper() for linear in parts}
        if len(algos) > 1:
            names = ", ".join(linear.short for linear in parts)
            what = f"{names} differ in format, and vLLM fuses them"
            where = f"{config.directory / 'config.json'}: quantized_layers of {parts[0].mixer}"
            yield Fault(where, what, _REMEDY)
