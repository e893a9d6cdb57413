"""Part of plugin_report.py, in the serve environment: what decides how vLLM decodes."""

import os

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import init_nvfp4_linear_kernel
from vllm.model_executor.layers.mamba.ops import mamba_ssm
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype
from vllm.model_executor.models.interfaces import supports_replayssm
from vllm.model_executor.models.nano_nemotron_vl import NemotronH_Nano_VL_V2
from vllm.platforms import current_platform

from hybridquant_vllm import DISPLACED_KERNELS, nvfp4_as_fp8
from hybridquant_vllm.nvfp4_as_fp8 import NvFp4AsFp8LinearKernel


def decode_report(checkpoint: str) -> dict:
    """Launches of the state update, ReplaySSM, and NVFP4 as FP8."""
    return {
        "launches": launches("NVIDIA_H100_80GB_HBM3", (64, 1, 20, 3)),
        "replayssm": replayssm(checkpoint),
        "stock replayssm": supports_replayssm(NemotronH_Nano_VL_V2),
        "nvfp4": nvfp4(),
    }


def launches(device: str, batches: tuple[int, ...]) -> list:
    """BLOCK_SIZE_M and num_warps of the 12B's state update, by VLLM_TUNED_CONFIG_FOLDER."""
    mamba_ssm.get_ssm_device_name = lambda: device
    choose = mamba_ssm.try_get_optimal_ssm_config
    return [choose(80, 128, batch, 128, "float32", False) for batch in batches]


def replayssm(checkpoint: str) -> dict:
    """What vLLM makes of --use-replayssm: accepted, and the state's types and shapes."""
    arguments = EngineArgs(
        checkpoint, max_model_len=4096, use_replayssm=True, mamba_backend="triton"
    )
    config = arguments.create_engine_config()
    model = config.model_config._model_info
    architecture = config.model_config.architecture
    states = config.model_config.registry.resolve_model_cls(
        config.model_config.architectures, config.model_config
    )[0].get_mamba_state_shape_from_config(config)
    return {
        "architecture": architecture,
        "supported": model.supports_replayssm,
        "shapes": [list(shape) for shape in states],
        "v2": config.use_v2_model_runner,
    }


class OnAnyDevice(NvFp4AsFp8LinearKernel):
    """Stands in for a Hopper GPU."""

    @classmethod
    def is_supported(cls, compute_capability=None):
        return True, None


class PerTokenProduct:
    """vLLM's FP8 product where this CPU has none: activations per token, weights per channel."""

    def process_weights_after_loading(self, layer):
        assert layer.weight.dtype == torch.float8_e4m3fn

    def apply_weights(self, layer, x, bias):
        scale = x.float().abs().amax(dim=-1, keepdim=True) / 448
        codes = (x.float() / scale).to(torch.float8_e4m3fn).float()
        return (codes @ layer.weight.float() * scale * layer.weight_scale.t() + bias).to(x.dtype)


def nvfp4() -> dict:
    """Which GPUs the kernel takes, whether vLLM takes it, and how near its products are."""
    os.environ["VLLM_DISABLED_KERNELS"] = ",".join(DISPLACED_KERNELS)
    supported = {}
    platform = type(current_platform)
    kept = platform.is_cuda
    platform.is_cuda = lambda self: True
    for capability in (80, 89, 90, 100, 120):
        supported[capability] = NvFp4AsFp8LinearKernel.is_supported(capability)[0]
    platform.is_cuda = kept
    with set_current_vllm_config(VllmConfig()):
        kernel_class = chosen()
        return {
            "supported": supported,
            "on a CPU": NvFp4AsFp8LinearKernel.is_supported()[0],
            "chosen": kernel_class.__name__,
            "difference": difference(kernel_class),
        }


def chosen() -> type:
    """What vLLM takes for W4A4 on a Hopper GPU."""
    nvfp4_as_fp8.register()
    nvfp4_as_fp8.register()
    kernels = linear._POSSIBLE_NVFP4_KERNELS
    cuda = list(kernels[type(current_platform._enum).CUDA])
    assert cuda.count(NvFp4AsFp8LinearKernel) == 1
    # What says on Hopper that it does not run there says so on a CPU as well.
    cuda[cuda.index(NvFp4AsFp8LinearKernel)] = OnAnyDevice
    kernels[current_platform._enum] = cuda
    return type(init_nvfp4_linear_kernel())


def difference(kernel_class: type) -> float:
    """Largest difference of the products, relative to the largest product."""
    torch.manual_seed(0)

    def parameter(values):
        return torch.nn.Parameter(values, requires_grad=False)

    layer = torch.nn.Module()
    layer.weight = parameter(torch.randint(0, 256, (48, 32), dtype=torch.uint8))
    layer.weight_scale = parameter((torch.rand(48, 4) * 440 + 8).to(torch.float8_e4m3fn))
    layer.weight_global_scale = parameter(torch.tensor(3e-5))
    layer.input_global_scale = parameter(torch.tensor(1.0))
    layer.alpha = parameter(torch.tensor(1.0))
    exact = dequantize_to_dtype(
        layer.weight, layer.weight_scale, layer.weight_global_scale, torch.float32, swizzle=False
    )
    kernel = kernel_class(linear.NvFp4LinearLayerConfig())
    asked = {}

    def fp8_kernel(**named):
        asked.update(named)
        return PerTokenProduct()

    nvfp4_as_fp8.init_fp8_linear_kernel = fp8_kernel
    kernel.process_weights_after_loading(layer)
    assert asked["weight_shape"] == (48, 64)
    assert not hasattr(layer, "alpha")
    x = torch.randn(5, 64).to(torch.bfloat16)
    bias = torch.randn(48).to(torch.bfloat16)
    expected = x.float() @ exact.t() + bias.float()
    found = kernel.apply_weights(layer, x, bias).float()
    return float((found - expected).abs().max() / expected.abs().max())
