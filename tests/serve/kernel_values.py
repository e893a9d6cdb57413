"""Runs in the serve environment: what the registered CPU kernels compute, against the formats'
definitions in float64, and how the plug-in registers them.

    python tests/serve/kernel_values.py        # prints JSON
"""

import json
import logging
import os

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import init_fp8_linear_kernel, init_nvfp4_linear_kernel
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym
from vllm.model_executor.layers.quantization.utils.w8a8_utils import requantize_with_max_scale
from vllm.platforms import PlatformEnum
from vllm.plugins import load_general_plugins

import hybridquant_vllm
from hybridquant_vllm.kernels import ReferenceFp8Kernel, ReferenceNvFp4Kernel, add_missing

E4M3 = torch.float8_e4m3fn
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
ROWS = 96
COLUMNS = 64
TOKENS = 7


def error(found, expected):
    """Largest difference, in units of the largest expected value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


def e4m3(values):
    return values.clamp(-448, 448).to(E4M3)


def e2m1(values):
    codes = (values.abs()[..., None] - E2M1).abs().argmin(-1)
    return E2M1[codes] * values.sign()


def nvfp4(values, scale):
    """Codes times block scale, with the global scale left out: [rows, blocks, 16], and the block
    scales.
    """
    blocks = values.double().reshape(values.shape[0], -1, 16)
    block_scale = e4m3((blocks.abs().amax(-1) / 6 / scale).float()).double()
    codes = e2m1((blocks / (block_scale * scale)[..., None]).clamp(-6, 6))
    return codes, block_scale


def pack(codes):
    indices = (codes.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (codes < 0)
    indices = indices.reshape(codes.shape[0], -1).to(torch.uint8)
    return indices[:, 0::2] | indices[:, 1::2] << 4


def main():
    torch.manual_seed(0)
    found = switched_off()
    load_general_plugins()
    x = (torch.randn(TOKENS, COLUMNS) * 1.7).to(torch.bfloat16)
    x[0, 0] = 30.0  # above the calibrated range: must saturate, not overflow to NaN
    weight = torch.randn(ROWS, COLUMNS) * 0.07
    with set_current_vllm_config(VllmConfig()):
        found |= fp8(x, weight) | fp4(x, weight) | fp4_weights(x, weight) | merging()
    found |= registered_again() | other_vllm()
    print(json.dumps(found))


def candidates():
    """Names of the CPU's candidates for FP8 and NVFP4, first first."""
    lists = (linear._POSSIBLE_FP8_KERNELS, linear._POSSIBLE_NVFP4_KERNELS)
    return [kernel.__name__ for kernels in lists for kernel in kernels.get(PlatformEnum.CPU, [])]


def switched_off():
    os.environ[hybridquant_vllm.SWITCH] = "0"
    hybridquant_vllm.register()
    del os.environ[hybridquant_vllm.SWITCH]
    refused = ""
    try:
        init_nvfp4_linear_kernel(use_a16=True)
    except ValueError as error:
        refused = str(error)
    return {"switched_off": candidates(), "weight_only_switched_off": refused}


def registered_again():
    before = candidates()
    add_missing()
    return {"candidates": before, "candidates_after_a_second_call": candidates()}


def other_vllm():
    """What `register` logs where vLLM has no list of FP8 kernels, instead of raising."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("vllm.hybridquant").addHandler(handler)
    del linear._POSSIBLE_FP8_KERNELS
    hybridquant_vllm.register()
    return {"other_vllm": messages}


def fp8(x, weight):
    key = kFp8StaticTensorSym
    kernel = init_fp8_linear_kernel(key, key, torch.bfloat16, torch.bfloat16, (ROWS, COLUMNS))
    assert isinstance(kernel, ReferenceFp8Kernel), type(kernel)
    layer = torch.nn.Module()
    weight_scale = weight.abs().max() / 448
    input_scale = torch.tensor(7.3 / 448)
    rounded = e4m3(weight / weight_scale)
    layer.weight = rounded.t()
    layer.weight_scale = weight_scale
    layer.input_scale = input_scale
    kernel.layer_param_names = ["weight", "weight_scale", "input_scale", "input_scale_ub"]
    kernel.process_weights_after_loading(layer)
    found = kernel.apply_weights(layer, x)
    wide = rounded.double() * weight_scale.double()
    inputs = e4m3(x.float() / input_scale).double() * input_scale.double()
    return {
        "fp8_error": error(found, inputs @ wide.t()),
        "fp8_error_if_w8a16": error(found, x.double().clamp(-7.3, 7.3) @ wide.t()),
    }


def fp4(x, weight):
    kernel = init_nvfp4_linear_kernel()
    assert isinstance(kernel, ReferenceNvFp4Kernel), type(kernel)
    layer = torch.nn.Module()
    weight_scale_2 = weight.abs().max().double() / 2688
    input_scale = torch.tensor(7.3 / 2688, dtype=torch.float64)
    codes, block_scale = nvfp4(weight, weight_scale_2)
    layer.weight = pack(codes)
    layer.weight_scale = e4m3(block_scale.float())
    layer.weight_global_scale = weight_scale_2.float()
    layer.input_global_scale_inv = 1 / input_scale.float()
    kernel.process_weights_after_loading(layer)
    found = kernel.apply_weights(layer, x)
    wide = (codes * (block_scale * weight_scale_2)[..., None]).reshape(ROWS, COLUMNS)
    input_codes, input_block = nvfp4(x, input_scale)
    inputs = (input_codes * (input_block * input_scale)[..., None]).reshape(TOKENS, COLUMNS)
    return {
        "nvfp4_error": error(found, inputs @ wide.t()),
        "nvfp4_error_if_w4a16": error(found, x.double() @ wide.t()),
    }


def fp4_weights(x, weight):
    kernel = init_nvfp4_linear_kernel(use_a16=True)
    layer = torch.nn.Module()
    weight_scale_2 = weight.abs().max().double() / 2688
    codes, block_scale = nvfp4(weight, weight_scale_2)
    layer.weight = pack(codes)
    layer.weight_scale = e4m3(block_scale.float())
    layer.weight_global_scale = weight_scale_2.float()
    kernel.process_weights_after_loading(layer)
    bias = torch.linspace(-1, 1, ROWS, dtype=torch.bfloat16)
    found = kernel.apply_weights(layer, x, bias)
    wide = (codes * (block_scale * weight_scale_2)[..., None]).reshape(ROWS, COLUMNS)
    return {
        "weight_only_kernel": type(kernel).__name__,
        "weight_only_error": error(found, x.double() @ wide.t() + bias.double()),
    }


def merging():
    parts = torch.randn(3, 16, COLUMNS)
    scales = torch.tensor([0.01, 0.02, 0.04])
    quantized = [e4m3(part / scale) for part, scale in zip(parts, scales)]
    expected = [part.float() * scale for part, scale in zip(quantized, scales)]
    scale, merged = requantize_with_max_scale(torch.cat(quantized), scales, [16, 16, 16])
    return {"merged_error": error(merged.float() * scale, torch.cat(expected).double())}


if __name__ == "__main__":
    main()
