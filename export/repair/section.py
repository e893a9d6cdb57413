"""The quantization section as the tensors require it: what is right stays, what is wrong is put
right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

from checkpoint.config import CheckpointConfig
from checkpoint.layout import language_model_linears
from export.layout import layer_algo
from export.matching import is_excluded
from export.write import quantization_config
from quantize.formats.registry import MIXED_PRECISION, UNQUANTIZED, find_format
from quantize.policy import Policy

CONFIG = "config.json"
LEGACY = "hf_quant_config.json"


@dataclass(frozen=True)
class Sections:
    """The repaired section of both files, and what was changed, a line each.

    Attributes:
        section: `quantization_config` of config.json.
        legacy: The content of hf_quant_config.json.
        changes: One line for each key.
    """

    section: dict[str, Any]
    legacy: dict[str, Any]
    changes: tuple[str, ...]


def repair_sections(
    config: CheckpointConfig,
    formats: Mapping[str, str],
    kv_scales: bool,
    section: Mapping[str, Any],
    legacy: Mapping[str, Any],
) -> Sections:
    """Put right what disagrees with the tensors.

    Args:
        config: The model's configuration.
        formats: Format of every linear by its tensors, `bf16` included.
        kv_scales: Whether attention has scales of a quantized KV cache.
        section: `quantization_config` of config.json as it is; empty if there is none.
        legacy: hf_quant_config.json as it is; empty if there is none.
    """
    policy = Policy(dict(formats), "fp8" if kv_scales else None, config.family)
    right_legacy = quantization_config(policy)
    right: dict[str, Any] = convert_hf_quant_config_format(right_legacy)
    if not section:
        changes = [f"{CONFIG}: quantization_config written anew from the tensors"]
        repaired = right
    else:
        repaired, changes = _repair_config(config, formats, section, right)
    new_legacy, more = _repair_legacy(repaired, legacy, right_legacy)
    return Sections(repaired, new_legacy, (*changes, *more))


def _repair_config(
    config: CheckpointConfig,
    formats: Mapping[str, str],
    section: Mapping[str, Any],
    right: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    repaired = dict(section)
    changes = []

    def put_right(key: str, reason: str) -> None:
        if key in right:
            repaired[key] = right[key]
        else:
            repaired.pop(key, None)
        changes.append(f"{CONFIG}: {key} {reason}")

    if section.get("quant_method") != right["quant_method"]:
        put_right("quant_method", "names ModelOpt")
    if str(section.get("quant_algo")).upper() != right["quant_algo"]:
        put_right("quant_algo", f"is {right['quant_algo']}, as the tensors are")
        if section.get("config_groups") != right.get("config_groups"):
            put_right("config_groups", "follows quant_algo")
    layers = right.get("quantized_layers")
    if layers is not None and not _same_layers(section.get("quantized_layers"), layers):
        put_right("quantized_layers", "gives each linear the format of its tensors")
    if section.get("kv_cache_scheme") != right.get("kv_cache_scheme"):
        put_right("kv_cache_scheme", "says whether there are KV cache scales")
    if not ignore_holds(config, formats, section.get("ignore"), right["quant_algo"]):
        put_right("ignore", "leaves out what has no scales, and nothing else")
    return _ordered(repaired, right), changes


def _ordered(repaired: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys in the order of an export, so that a repaired file has the same bytes."""
    known = {key: repaired[key] for key in right if key in repaired}
    return {**known, **repaired}


def ignore_holds(
    config: CheckpointConfig, formats: Mapping[str, str], entries: object, algo: str
) -> bool:
    """Return whether vLLM reads from an exclude list which modules have scales.

    Args:
        config: The model's configuration.
        formats: Format of every linear by its tensors.
        entries: `ignore` as it is.
        algo: The right `quant_algo`; with MIXED_PRECISION, only what the table names is quantized.
    """
    if not isinstance(entries, list):
        return False
    for entry in entries:
        if not isinstance(entry, str) or not entry or not entry.isprintable():
            return False
    family = config.family
    has_scales = {}
    for linear in language_model_linears(config):
        has_scales[family.fused_module(linear.name)] = formats[linear.name] != UNQUANTIZED
    has_scales[family.vllm_module(family.lm_head)] = False
    for layer in range(config.depth):
        if config.mixer_kind(layer) == "mamba":
            module = f"{family.layer_prefix(layer)}mixer.conv1d"
            has_scales[family.vllm_module(module)] = False
    for module, is_quantized in has_scales.items():
        excluded = is_excluded(module, entries, family)
        if is_quantized and excluded:
            return False
        if not is_quantized and not excluded and algo != MIXED_PRECISION:
            return False
    return True


def _same_layers(table: object, right: Mapping[str, Any]) -> bool:
    if not isinstance(table, dict) or set(table) != set(right):
        return False
    for name, entry in table.items():
        format = find_format(layer_algo(entry))
        wanted = find_format(layer_algo(right[name]))
        if format is not wanted or entry.get("group_size") != right[name].get("group_size"):
            return False
    return True


def _repair_legacy(
    section: Mapping[str, Any], legacy: Mapping[str, Any], right: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Let hf_quant_config.json say what config.json says."""
    wanted = dict(right["quantization"])
    wanted["quant_algo"] = section["quant_algo"]
    wanted["exclude_modules"] = section["ignore"]
    own = legacy.get("quantization")
    if not isinstance(own, dict):
        written = {"producer": right["producer"], "quantization": wanted}
        return written, [f"{LEGACY}: written anew, as config.json says"]
    repaired = dict(own)
    changes = []
    for key, value in wanted.items():
        if key not in own or own[key] != value:
            repaired[key] = value
            changes.append(f"{LEGACY}: {key} is as in config.json")
    if "group_size" in own and "group_size" not in wanted:
        del repaired["group_size"]
        changes.append(f"{LEGACY}: group_size removed: the format has none")
    return {**legacy, "quantization": _ordered(repaired, wanted)}, changes
