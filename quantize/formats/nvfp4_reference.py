"""NVFP4 fake quantization in plain PyTorch, as a ModelOpt backend for machines without CUDA.

The rounding is that of `NVFP4QTensor`, which ModelOpt's exporter uses; only the block scales are
computed here, by the rule of ModelOpt's Triton kernel
(modelopt/torch/kernels/quantization/common/nvfp4_quant.py). The two differ in blocks of tiny
values: the kernel makes them zeros, the exporter gives them the smallest scale.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
BLOCK = 16
"""Consecutive values under one block scale."""
E2M1_MAX = 6.0
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
_SMALLEST = 1e-5
"""Blocks whose scale is below this become zeros in the Triton kernel."""


def register_backend() -> str:
    """Make ModelOpt quantize to NVFP4 on a CPU, and return the name of the backend.

    Upstream traps of ModelOpt 0.47 without CUDA: a quantizer with dynamic block scales raises
    "amax must be a CUDA tensor for dynamic block quantization" unless it has its own backend.
    A quantizer with static block scales, which `mse` and `gptq` set, never uses a backend and
    raises "static_blockwise_fp4_fake_quant requires triton"; that function is replaced here for
    tensors on a CPU.
    """
    if not is_registered_quant_backend(BACKEND):
        register_quant_backend(BACKEND, _quantize_dynamic)
        on_cuda = tensor_quantizer.static_blockwise_fp4_fake_quant
        replacement = partial(_quantize_static, on_cuda)
        tensor_quantizer.static_blockwise_fp4_fake_quant = replacement
    return BACKEND


def fake_quantize(inputs: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Round `inputs` [..., n] to NVFP4 and back, n a multiple of 16.

    Args:
        inputs: Any floating dtype; the result has the same.
        amax: The tensor's calibrated absolute maximum, one number; blocks above it saturate.
    """
    flat = inputs.reshape(-1, inputs.shape[-1])
    tensor_scale = (amax.float() / (E2M1_MAX * E4M3_MAX)).reshape(()).to(inputs.device)
    block_amax = flat.float().unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    exact_scale = (block_amax / (E2M1_MAX * tensor_scale)).clamp(max=E4M3_MAX)
    scale = exact_scale.to(torch.float8_e4m3fn).float()
    # In blocks of tiny values, a scale of 1 after both scales are applied rounds all of them to 0.
    scale = torch.where(scale * tensor_scale >= _SMALLEST, scale, 1 / tensor_scale)
    packed, _, _ = NVFP4QTensor.quantize(flat, BLOCK, scale, tensor_scale)
    rounded = packed.dequantize(
        dtype=torch.float32, scale=scale, double_scale=tensor_scale, block_sizes={-1: BLOCK}
    )
    return rounded.to(inputs.dtype).reshape(inputs.shape)


@torch.no_grad()
def fake_quantize_static(
    inputs: torch.Tensor, amax: torch.Tensor, global_amax: torch.Tensor
) -> torch.Tensor:
    """Round `inputs` to NVFP4 and back with given block ranges.

    Args:
        inputs: Any floating dtype; the result has the same. A block is a run of
            `inputs.numel() / amax.numel()` consecutive numbers.
        amax: Range of each block. It is rounded to E4M3 under `global_amax`, as
            `compute_fp4_scales` in ModelOpt's kernels/quantization/gemm/fp4_kernel.py does.
        global_amax: The range of the tensor, one number.
    """
    scale = scaled_e4m3_impl(amax.float() / E2M1_MAX, global_amax.float() / E2M1_MAX)
    scale = scale.reshape(-1, 1)
    is_zero = scale == 0
    divisor = torch.where(is_zero, 1.0, scale)
    one = torch.ones(())
    blocks = inputs.float().reshape(len(scale), -1)
    block_size = blocks.shape[1]
    packed, _, _ = NVFP4QTensor.quantize(blocks, block_size, divisor, one)
    rounded = packed.dequantize(
        dtype=torch.float32, scale=divisor, double_scale=one, block_sizes={-1: block_size}
    )
    return torch.where(is_zero, 0.0, rounded).to(inputs.dtype).reshape(inputs.shape)


class _StraightThrough(torch.autograd.Function):
    """Rounds in the forward pass and passes the gradient through unchanged, as ModelOpt's dynamic
    block quantization does by default.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
        return fake_quantize(inputs, amax)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def _quantize_dynamic(inputs: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    amax = quantizer.amax
    if amax is None:
        amax = inputs.detach().abs().amax()
    rounded: torch.Tensor = _StraightThrough.apply(inputs, amax)
    return rounded


def _quantize_static(
    on_cuda: Callable[..., torch.Tensor],
    inputs: torch.Tensor,
    amax: torch.Tensor,
    global_amax: torch.Tensor,
    *others: Any,
) -> torch.Tensor:
    if inputs.is_cuda:
        return on_cuda(inputs, amax, global_amax, *others)
    return fake_quantize_static(inputs, amax, global_amax)
