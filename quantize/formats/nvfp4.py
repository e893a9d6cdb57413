"""NVFP4 (W4A4): weights and activations in E2M1, with an E4M3 scale for each block of 16 and one
float32 scale per tensor.

On disk: `weight` uint8 [out, in / 2], two codes per byte; `weight_scale` E4M3 [out, in / 16];
`weight_scale_2` and `input_scale` float32 []. A weight is its code times both weight scales;
activations get their block scales while the model runs. Packing and unpacking are ModelOpt's own
functions, so the bytes equal those of its exporter.
"""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export.model_config import QUANTIZATION_NVFP4
from modelopt.torch.export.quant_utils import (
    get_activation_scaling_factor,
    get_weight_block_size,
    get_weight_scaling_factor,
    get_weight_scaling_factor_2,
    to_quantized_weight,
)
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from checkpoint.layout import TensorSpec
from quantize.formats.nvfp4_reference import BLOCK, E2M1_MAX, E4M3_MAX, register_backend
from quantize.formats.registry import (
    INPUT_QUANTIZER,
    WEIGHT_QUANTIZER,
    Format,
    Tensors,
    preset_settings,
    scalar,
)


def weight_tensors(shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes on disk of an NVFP4 weight of shape (out, in)."""
    rows, columns = shape
    return {
        "weight": TensorSpec((rows, columns // 2), "U8"),
        "weight_scale": TensorSpec((rows, columns // BLOCK), "F8_E4M3"),
        "weight_scale_2": TensorSpec((), "F32"),
    }


def pack_weight(module: Any) -> dict[str, torch.Tensor]:
    """Return the tensors on disk of a calibrated module's weight."""
    block_scale = get_weight_scaling_factor(module)
    tensor_scale = scalar(get_weight_scaling_factor_2(module))
    packed = to_quantized_weight(
        module.weight.detach(),
        block_scale,
        QUANTIZATION_NVFP4,
        tensor_scale,
        get_weight_block_size(module),
    )
    return {"weight": packed, "weight_scale": block_scale, "weight_scale_2": tensor_scale}


def unpack_weight(tensors: Tensors) -> torch.Tensor:
    """Return the float32 weight [out, in] that packed tensors represent."""
    rows, half = tensors["weight"].shape
    packed = NVFP4QTensor(torch.Size((rows, 2 * half)), torch.float32, tensors["weight"])
    weight: torch.Tensor = packed.dequantize(
        scale=tensors["weight_scale"],
        double_scale=tensors["weight_scale_2"],
        block_sizes={-1: BLOCK},
    )
    return weight


def error_bound(source: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """Return the largest error of rounding for each element of `source` [out, in]."""
    # Between 4 and 6, E2M1's widest gap, half a step is one block scale. The block scale is itself
    # rounded to E4M3, which clips the block's largest value by at most 6 · 2^-4; blocks of tiny
    # values have E4M3's smallest scale, 2^-9.
    return _weight_scales(tensors) * 1.01 + source.abs() * 2**-8


def largest(tensors: Tensors) -> torch.Tensor:
    """Return the largest magnitude that the scales can express for each element [out, in]."""
    return _weight_scales(tensors) * E2M1_MAX


def _weight_scales(tensors: Tensors) -> torch.Tensor:
    """The scale of each weight [out, in]."""
    scales = tensors["weight_scale"].float() * tensors["weight_scale_2"]
    return scales.repeat_interleave(BLOCK, dim=1)


def _tensors(shape: tuple[int, int]) -> dict[str, TensorSpec]:
    specs = weight_tensors(shape)
    specs["input_scale"] = TensorSpec((), "F32")
    return specs


def _pack(module: Any) -> dict[str, torch.Tensor]:
    tensors = pack_weight(module)
    tensors["input_scale"] = scalar(get_activation_scaling_factor(module))
    return tensors


def _input_amax(input_scale: torch.Tensor) -> torch.Tensor:
    return input_scale * E4M3_MAX * E2M1_MAX


NVFP4 = Format(
    name="nvfp4",
    algo="NVFP4",
    weight_quantizer=preset_settings(mtq.NVFP4_DEFAULT_CFG, WEIGHT_QUANTIZER),
    input_quantizer=preset_settings(mtq.NVFP4_DEFAULT_CFG, INPUT_QUANTIZER),
    tensors=_tensors,
    pack=_pack,
    unpack=unpack_weight,
    error_bound=error_bound,
    largest=largest,
    relative_error=0.096,
    multiple=BLOCK,
    group_size=BLOCK,
    # vLLM's fused layer has one `weight_scale_2`, and codes cannot be rescaled.
    shares_ranges=True,
    fused_scales=("input_scale", "weight_scale_2"),
    input_amax=_input_amax,
    cpu_backend=register_backend,
    searched_weight_quantizer=preset_settings(
        mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG, WEIGHT_QUANTIZER
    ),
)
