"""A linear kernel for NVFP4 on GPUs with FP8 and without FP4 arithmetic: Hopper and Ada.

vLLM has Marlin there, which unpacks the weights for each product and multiplies in BF16. This one
converts them to FP8 while loading (`nvfp4_to_fp8`) and multiplies with vLLM's own FP8 kernel,
activations quantized per token. The weights take the memory of an FP8 export.

vLLM takes the first kernel of its list that supports the GPU, and ours is appended: it is chosen
where VLLM_DISABLED_KERNELS names `DISPLACED_KERNELS`, all that come before it on such a GPU.
`hybridquant serve --nvfp4-as-fp8 true` sets that; weight-only checkpoints (W4A16) keep Marlin.
Written for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none, set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import (
    NvFp4LinearKernel,
    NvFp4LinearLayerConfig,
    init_fp8_linear_kernel,
    register_linear_kernel,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTokenSym,
    kFp8StaticTokenSym,
)
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import PlatformEnum, current_platform

from hybridquant_vllm.nvfp4_to_fp8 import to_fp8

# Below "vllm", so that vLLM's own log handler prints it.
logger = init_logger("vllm.hybridquant")

FIRST_CAPABILITY = 89
"""First compute capability with FP8 arithmetic, as vLLM counts."""

FP4_CAPABILITY = 100
"""First one with FP4 arithmetic, where vLLM's own kernels are right."""


class NvFp4AsFp8LinearKernel(NvFp4LinearKernel):
    """NVFP4 weights as FP8, one scale per output channel; activations in FP8, one scale per
    token.
    """

    def __init__(self, config: NvFp4LinearLayerConfig) -> None:
        super().__init__(config)
        self._vllm_config = get_current_vllm_config_or_none()
        self._dtype = torch.get_default_dtype()
        if self._vllm_config is not None and self._vllm_config.model_config is not None:
            self._dtype = self._vllm_config.model_config.dtype
        self._fp8: Any = None

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Run on GPUs with FP8 and without FP4 arithmetic."""
        if not current_platform.is_cuda():
            return False, "needs an NVIDIA GPU"
        if compute_capability is None:
            found = current_platform.get_device_capability()
            compute_capability = found.to_int() if found is not None else 0
        if FIRST_CAPABILITY <= compute_capability < FP4_CAPABILITY:
            return True, None
        return False, "needs a GPU with FP8 and without FP4 arithmetic"

    @classmethod
    def can_implement(cls, config: NvFp4LinearLayerConfig) -> tuple[bool, str | None]:
        """Take every layer of the format."""
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the weights by FP8 and choose vLLM's kernel for them.

        Args:
            layer: With `weight` uint8 [out, in / 2], `weight_scale` E4M3 [out, in / 16] and
                `weight_global_scale` float32 [].
        """
        logger.info_once(
            "hybridquant: NVFP4 weights are converted to FP8, activations are quantized to FP8."
        )
        given: Any = layer
        converted = to_fp8(
            given.weight.data, given.weight_scale.data, given.weight_global_scale.data
        )
        outputs, inputs = converted.weight.shape
        # FP8 kernels take [in, out], the columns contiguous.
        replace_parameter(layer, "weight", converted.weight.t())
        replace_parameter(layer, "weight_scale", converted.scale)
        # Of the NVFP4 layer; FP8 kernels look for an `input_scale` and find none: it is dynamic.
        for name in ("input_global_scale", "input_global_scale_inv", "alpha"):
            if hasattr(layer, name):
                delattr(layer, name)
        if self._vllm_config is None:
            self._fp8 = self._fp8_kernel((outputs, inputs))
        else:
            with set_current_vllm_config(self._vllm_config):
                self._fp8 = self._fp8_kernel((outputs, inputs))
        self._fp8.process_weights_after_loading(layer)

    def _fp8_kernel(self, shape: tuple[int, int]) -> Any:
        return init_fp8_linear_kernel(
            activation_quant_key=kFp8DynamicTokenSym,
            weight_quant_key=kFp8StaticTokenSym,
            input_dtype=self._dtype,
            out_dtype=self._dtype,
            weight_shape=shape,
            module_name=type(self).__name__,
        )

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute x @ weight.T + bias.

        Args:
            layer: After `process_weights_after_loading`.
            x: [..., in].
            bias: [out].
        """
        result: torch.Tensor = self._fp8.apply_weights(layer, x, bias)
        return result


@functools.cache
def register() -> None:
    """Append the kernel to vLLM's list; a second call changes nothing."""
    register_linear_kernel(NvFp4AsFp8LinearKernel, PlatformEnum.CUDA, "nvfp4")
