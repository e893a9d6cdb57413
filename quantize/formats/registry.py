"""The formats a linear layer can have: ModelOpt's quantizer settings, the tensors on disk, packing
and unpacking.

Packing and unpacking are ModelOpt's own functions, so the bytes equal those of its exporter; adding
a format is adding one entry to `FORMATS`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export.quant_utils import (
    from_quantized_weight,
    get_activation_scaling_factor,
    get_weight_block_size,
    get_weight_scaling_factor,
    get_weight_scaling_factor_2,
    preprocess_linear_fusion,
    to_quantized_weight,
)
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from checkpoint.layout import TensorSpec
from quantize.formats.nvfp4_reference import BACKEND as NVFP4_REFERENCE

E4M3_MAX = 448.0
E2M1_MAX = 6.0
NVFP4_BLOCK = 16

Tensors = Mapping[str, torch.Tensor]
"""A packed linear: `weight`, `weight_scale`, `input_scale` and, for NVFP4, `weight_scale_2`."""


@dataclass(frozen=True)
class Format:
    """One quantization format.

    Attributes:
        name: As recipes write it.
        algo: vLLM's and ModelOpt's name, `quant_algo`.
        weight_quantizer: ModelOpt's settings of the weight quantizer.
        input_quantizer: ModelOpt's settings of the input quantizer.
        shares_scales: Whether q, k and v must carry equal input and global weight scales for vLLM
            to fuse them.
        columns: in_features must be a multiple of this.
        tensors: Names, shapes and dtypes on disk of a linear of shape (out, in).
        pack: The tensors of a calibrated module.
        unpack: The float32 weight [out, in] that packed tensors stand for.
        error_bound: Largest |unpacked − source| that rounding can cause, element by element,
            float32 [out, in].
        largest: Largest magnitude that the stored scales can express, element by element or one for
            all.
        relative_error: ‖unpacked − source‖ / ‖source‖ by rounding at absolute maxima, measured on
            normal weights.
        input_amax: The input range that a stored `input_scale` stands for.
        cpu_backend: ModelOpt backend that fake-quantizes where there is no CUDA; None where
            ModelOpt's own does.
        searched_weight_quantizer: The weight quantizer's settings for algorithms that set each
            block scale; None where there are no blocks.
    """

    name: str
    algo: str
    weight_quantizer: Mapping[str, Any]
    input_quantizer: Mapping[str, Any]
    shares_scales: bool
    columns: int
    tensors: Callable[[tuple[int, int]], dict[str, TensorSpec]]
    pack: Callable[[Any], dict[str, torch.Tensor]]
    unpack: Callable[[Tensors], torch.Tensor]
    error_bound: Callable[[torch.Tensor, Tensors], torch.Tensor]
    largest: Callable[[Tensors], torch.Tensor]
    relative_error: float
    input_amax: Callable[[torch.Tensor], torch.Tensor]
    cpu_backend: str | None = None
    searched_weight_quantizer: Mapping[str, Any] | None = None

    def quantizer(self, name: str, device: str, searched: bool = False) -> dict[str, Any]:
        """ModelOpt's settings of the `weight_quantizer` or `input_quantizer` for a model on
        `device`.

        Args:
            name: Which of the two.
            device: A torch device.
            searched: Whether the algorithm sets each block scale.
        """
        if searched and name == "weight_quantizer" and self.searched_weight_quantizer:
            # ModelOpt sweeps the scales of quantizers without a backend only, and static ones never
            # ask for it.
            return copy.deepcopy(dict(self.searched_weight_quantizer))
        settings = copy.deepcopy(dict(getattr(self, name)))
        if self.cpu_backend and not device.startswith("cuda"):
            settings["backend"] = self.cpu_backend
        return settings

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What follows a linear's name in the names of its tensors on disk."""
        return tuple(self.tensors((NVFP4_BLOCK, NVFP4_BLOCK)))


def _settings(config: Mapping[str, Any], quantizer: str) -> dict[str, Any]:
    """The settings ModelOpt's preset gives to every weight or input quantizer."""
    (entry,) = [
        e for e in config["quant_cfg"] if e["quantizer_name"] == f"*{quantizer}" and "cfg" in e
    ]
    return copy.deepcopy(entry["cfg"])


def _scalar(scale: torch.Tensor) -> torch.Tensor:
    return scale.float().reshape(())


def _fp8_tensors(shape: tuple[int, int]) -> dict[str, TensorSpec]:
    scalar = TensorSpec((), "F32")
    return {"weight": TensorSpec(shape, "F8_E4M3"), "weight_scale": scalar, "input_scale": scalar}


def _fp8_pack(module: Any) -> dict[str, torch.Tensor]:
    weight_scale = _scalar(get_weight_scaling_factor(module))
    return {
        "weight": to_quantized_weight(module.weight.detach(), weight_scale, "fp8"),
        "weight_scale": weight_scale,
        "input_scale": _scalar(get_activation_scaling_factor(module)),
    }


def _fp8_unpack(tensors: Tensors) -> torch.Tensor:
    return from_quantized_weight(tensors["weight"], tensors["weight_scale"], "fp8", torch.float32)


def _fp8_error_bound(source: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    # E4M3 has 3 mantissa bits: half a step is 2^-4 of the value, 2^-10 below the smallest normal
    # (2^-6). Dividing a BF16 weight by the scale rounds once more, to BF16 (2^-9 of the value).
    return source.abs() * (2**-4 + 2**-8) + tensors["weight_scale"] * 2**-9


def _nvfp4_tensors(shape: tuple[int, int]) -> dict[str, TensorSpec]:
    rows, columns = shape
    return {
        "weight": TensorSpec((rows, columns // 2), "U8"),
        "weight_scale": TensorSpec((rows, columns // NVFP4_BLOCK), "F8_E4M3"),
        "weight_scale_2": TensorSpec((), "F32"),
        "input_scale": TensorSpec((), "F32"),
    }


def _nvfp4_pack(module: Any) -> dict[str, torch.Tensor]:
    scale, scale_2 = get_weight_scaling_factor(module), _scalar(get_weight_scaling_factor_2(module))
    packed = to_quantized_weight(
        module.weight.detach(), scale, "nvfp4", scale_2, get_weight_block_size(module)
    )
    return {
        "weight": packed,
        "weight_scale": scale,
        "weight_scale_2": scale_2,
        "input_scale": _scalar(get_activation_scaling_factor(module)),
    }


def _nvfp4_unpack(tensors: Tensors) -> torch.Tensor:
    rows, half = tensors["weight"].shape
    packed = NVFP4QTensor(torch.Size((rows, 2 * half)), torch.float32, tensors["weight"])
    return packed.dequantize(
        scale=tensors["weight_scale"],
        double_scale=tensors["weight_scale_2"],
        block_sizes={-1: NVFP4_BLOCK},
    )


def _nvfp4_error_bound(source: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    # Between 4 and 6, E2M1's widest gap, half a step is one block scale. The block scale is itself
    # rounded to E4M3, which clips the block's largest value by at most 6 · 2^-4; tiny blocks are
    # held at E4M3's smallest scale, 2^-9.
    return _nvfp4_scales(tensors) * 1.01 + source.abs() * 2**-8


def _nvfp4_scales(tensors: Tensors) -> torch.Tensor:
    """The scale of each weight [out, in]."""
    return (tensors["weight_scale"].float() * tensors["weight_scale_2"]).repeat_interleave(
        NVFP4_BLOCK, dim=1
    )


FORMATS: dict[str, Format] = {
    "fp8": Format(
        name="fp8",
        algo="FP8",
        weight_quantizer=_settings(mtq.FP8_DEFAULT_CFG, "weight_quantizer"),
        input_quantizer=_settings(mtq.FP8_DEFAULT_CFG, "input_quantizer"),
        shares_scales=False,
        columns=16,
        tensors=_fp8_tensors,
        pack=_fp8_pack,
        unpack=_fp8_unpack,
        error_bound=_fp8_error_bound,
        largest=lambda tensors: tensors["weight_scale"] * E4M3_MAX,
        relative_error=0.027,
        input_amax=lambda input_scale: input_scale * E4M3_MAX,
    ),
    "nvfp4": Format(
        name="nvfp4",
        algo="NVFP4",
        weight_quantizer=_settings(mtq.NVFP4_DEFAULT_CFG, "weight_quantizer"),
        input_quantizer=_settings(mtq.NVFP4_DEFAULT_CFG, "input_quantizer"),
        shares_scales=True,
        columns=NVFP4_BLOCK,
        tensors=_nvfp4_tensors,
        pack=_nvfp4_pack,
        unpack=_nvfp4_unpack,
        error_bound=_nvfp4_error_bound,
        largest=lambda tensors: _nvfp4_scales(tensors) * E2M1_MAX,
        relative_error=0.096,
        input_amax=lambda input_scale: input_scale * E4M3_MAX * E2M1_MAX,
        cpu_backend=NVFP4_REFERENCE,
        searched_weight_quantizer=_settings(
            mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG, "weight_quantizer"
        ),
    ),
}

UNQUANTIZED = "bf16"
"""What a policy writes for a layer that stays as it is."""


def share_scales(modules: list[torch.nn.Module]) -> None:
    """Give q, k and v one input range and one global weight range, as vLLM's fused layer needs for
    NVFP4.
    """
    preprocess_linear_fusion(modules)
