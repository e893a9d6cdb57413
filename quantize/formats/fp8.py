"""FP8 (W8A8): weights and activations in E4M3, each with one static scale per tensor.

On disk: `weight` E4M3 [out, in], `weight_scale` and `input_scale` float32 []. A weight is its code
times `weight_scale`. Packing and unpacking are ModelOpt's own functions, so the bytes equal those
of its exporter.
"""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export.model_config import QUANTIZATION_FP8
from modelopt.torch.export.quant_utils import (
    from_quantized_weight,
    get_activation_scaling_factor,
    get_weight_scaling_factor,
    to_quantized_weight,
)

from checkpoint.layout import TensorSpec
from quantize.formats.registry import (
    INPUT_QUANTIZER,
    WEIGHT_QUANTIZER,
    Format,
    Tensors,
    preset_settings,
    scalar,
)

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


def _tensors(shape: tuple[int, int]) -> dict[str, TensorSpec]:
    return {
        "weight": TensorSpec(shape, "F8_E4M3"),
        "weight_scale": TensorSpec((), "F32"),
        "input_scale": TensorSpec((), "F32"),
    }


def _pack(module: Any) -> dict[str, torch.Tensor]:
    weight_scale = scalar(get_weight_scaling_factor(module))
    return {
        "weight": to_quantized_weight(module.weight.detach(), weight_scale, QUANTIZATION_FP8),
        "weight_scale": weight_scale,
        "input_scale": scalar(get_activation_scaling_factor(module)),
    }


def _unpack(tensors: Tensors) -> torch.Tensor:
    weight: torch.Tensor = from_quantized_weight(
        tensors["weight"], tensors["weight_scale"], QUANTIZATION_FP8, torch.float32
    )
    return weight


def _error_bound(source: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    # E4M3 has 3 mantissa bits: half a step is 2^-4 of the value, and 2^-10 below the smallest
    # normal number, 2^-6. Dividing a BF16 weight by the scale rounds once more, to BF16: 2^-9 of
    # the value. The last two are doubled as a margin.
    return source.abs() * (2**-4 + 2**-8) + tensors["weight_scale"] * 2**-9


def _largest(tensors: Tensors) -> torch.Tensor:
    return tensors["weight_scale"] * E4M3_MAX


def _input_amax(input_scale: torch.Tensor) -> torch.Tensor:
    return input_scale * E4M3_MAX


FP8 = Format(
    name="fp8",
    algo="FP8",
    weight_quantizer=preset_settings(mtq.FP8_DEFAULT_CFG, WEIGHT_QUANTIZER),
    input_quantizer=preset_settings(mtq.FP8_DEFAULT_CFG, INPUT_QUANTIZER),
    tensors=_tensors,
    pack=_pack,
    unpack=_unpack,
    error_bound=_error_bound,
    largest=_largest,
    relative_error=0.027,
    multiple=16,
    group_size=None,
    # vLLM requantizes q, k and v to the largest of their three weight scales, so they may differ.
    shares_ranges=False,
    fused_scales=("input_scale",),
    input_amax=_input_amax,
)
