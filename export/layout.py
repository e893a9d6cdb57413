"""What a quantized directory holds, told from its files: the format of each linear and the tensors
that follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoint.config import CheckpointConfig
from checkpoint.layout import Linear, TensorSpec, expected_tensors, language_model_linears
from quantize.formats.registry import FORMATS

_BY_DTYPE = {"F8_E4M3": "fp8", "U8": "nvfp4"}


def quantization_section(config: CheckpointConfig) -> Mapping[str, Any]:
    """`quantization_config` of config.json; empty for a BF16 checkpoint."""
    section = config.raw.get("quantization_config")
    return section if isinstance(section, dict) else {}


def linear_formats(config: CheckpointConfig, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The format of every quantized linear, told from the dtype of its weight."""
    found = {}
    for linear in language_model_linears(config):
        weight = specs.get(f"{linear.name}.weight")
        if weight is not None and weight.dtype in _BY_DTYPE:
            found[linear.name] = _BY_DTYPE[weight.dtype]
    return found


def quantized_layout(
    config: CheckpointConfig, formats: Mapping[str, str], kv_scales: bool
) -> dict[str, TensorSpec]:
    """Every tensor a directory with these formats must hold.

    Args:
        config: The checkpoint's configuration.
        formats: Format of every quantized linear.
        kv_scales: Whether attention carries `k_scale` and `v_scale`.
    """
    specs = dict(expected_tensors(config))
    for linear in language_model_linears(config):
        if linear.name in formats:
            del specs[f"{linear.name}.weight"]
            packed = FORMATS[formats[linear.name]].tensors(linear.shape)
            specs |= {f"{linear.name}.{suffix}": spec for suffix, spec in packed.items()}
        if kv_scales and linear.short in ("k_proj", "v_proj"):
            specs[kv_scale_name(linear)] = TensorSpec((), "F32")
    return specs


def kv_scale_name(linear: Linear) -> str:
    """`….k_proj.k_scale` or `….v_proj.v_scale`."""
    return f"{linear.name}.{linear.short[0]}_scale"
