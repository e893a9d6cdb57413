"""NVFP4 fake quantization in plain PyTorch, as a ModelOpt backend for machines without CUDA.

ModelOpt 0.47's own path asserts "amax must be a CUDA tensor for dynamic block quantization". The
rounding here is `NVFP4QTensor`'s, ModelOpt's exporter's own; only the block scales are computed
here, by the rule of its Triton kernel (modelopt/torch/kernels/quantization/common/nvfp4_quant.py),
which holds tiny blocks at zero where the exporter holds them at the smallest scale.

Quantizers with static block scales, which MSE and GPTQ set, never ask for a backend: on a CPU they
raise "static_blockwise_fp4_fake_quant requires triton". For them the function is exchanged where
its tensors are on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.nn.modules import tensor_quantizer
from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
    is_registered_quant_backend,
    register_quant_backend,
)
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from modelopt.torch.quantization.tensor_quant import scaled_e4m3_impl

BACKEND = "hybridquant_nvfp4_reference"
_BLOCK = 16
_E2M1_MAX, _E4M3_MAX = 6.0, 448.0
_SMALLEST = 1e-5
"""Blocks whose scale is below this become zeros in the Triton kernel."""


def fake_quantize(inputs: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Round `inputs` [..., n] to NVFP4 and back, n a multiple of 16.

    Args:
        inputs: Any floating dtype; the result has the same.
        amax: The tensor's calibrated absolute maximum, one number; blocks above it saturate.
    """
    flat = inputs.reshape(-1, inputs.shape[-1])
    scale_2 = (amax.float() / (_E2M1_MAX * _E4M3_MAX)).reshape(()).to(inputs.device)
    blocks = flat.float().unflatten(-1, (-1, _BLOCK)).abs().amax(-1)
    scale = (blocks / (_E2M1_MAX * scale_2)).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn).float()
    scale = torch.where(scale * scale_2 >= _SMALLEST, scale, 1 / scale_2)
    packed, _, _ = NVFP4QTensor.quantize(flat, _BLOCK, scale, scale_2)
    rounded = packed.dequantize(
        dtype=torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: _BLOCK}
    )
    return rounded.to(inputs.dtype).reshape(inputs.shape)


@torch.no_grad()
def fake_quantize_static(
    inputs: torch.Tensor, amax: torch.Tensor, global_amax: torch.Tensor
) -> torch.Tensor:
    """Round `inputs` to NVFP4 and back by given ranges.

    Args:
        inputs: Any floating dtype; the result has the same. Consecutive runs of `inputs.numel() /
            amax.numel()` numbers are a block.
        amax: Range of each block; rounded to E4M3 under `global_amax`, as `compute_fp4_scales` in
            ModelOpt's kernels/quantization/gemm/fp4_kernel.py does.
        global_amax: The tensor's, one number.
    """
    scale = scaled_e4m3_impl(amax.float() / _E2M1_MAX, global_amax.float() / _E2M1_MAX).reshape(
        -1, 1
    )
    safe = torch.where(scale == 0, 1.0, scale)
    blocks = inputs.float().reshape(len(scale), -1)
    packed, _, _ = NVFP4QTensor.quantize(blocks, blocks.shape[1], safe, torch.ones(()))
    whole = {-1: blocks.shape[1]}
    rounded = packed.dequantize(
        dtype=torch.float32, scale=safe, double_scale=torch.ones(()), block_sizes=whole
    )
    return torch.where(scale == 0, 0.0, rounded).to(inputs.dtype).reshape(inputs.shape)


class _StraightThrough(torch.autograd.Function):
    """Rounds forward, passes the gradient through, as ModelOpt's dynamic block quantization does by
    default.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
        return fake_quantize(inputs, amax)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def _entry(inputs: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    amax = quantizer.amax if quantizer.amax is not None else inputs.detach().abs().amax()
    return _StraightThrough.apply(inputs, amax)


_TRITONS = tensor_quantizer.static_blockwise_fp4_fake_quant


def _static_entry(
    inputs: torch.Tensor, amax: torch.Tensor, global_amax: torch.Tensor, *others: Any
) -> torch.Tensor:
    if inputs.is_cuda:
        return _TRITONS(inputs, amax, global_amax, *others)
    return fake_quantize_static(inputs, amax, global_amax)


if not is_registered_quant_backend(BACKEND):
    register_quant_backend(BACKEND, _entry)
    tensor_quantizer.static_blockwise_fp4_fake_quant = _static_entry
