"""Reference linear kernels, and where they go in vLLM's lists of candidates.

Written for vLLM 0.32 and 0.33.
"""

from typing import Any

import torch
from vllm import _custom_ops
from vllm.logger import init_logger
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import (
    EmulationNvFp4LinearKernel,
    NvFp4LinearKernel,
    NvFp4LinearLayerConfig,
    PerTensorTorchFP8ScaledMMLinearKernel,
    register_linear_kernel,
)
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    dequantize_to_dtype,
)
from vllm.platforms import PlatformEnum

# Below "vllm", so that vLLM's own log handler prints it.
logger = init_logger("vllm.hybridquant")

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max


class ReferenceFp8Kernel(PerTensorTorchFP8ScaledMMLinearKernel):
    """FP8 W8A8 with one scale per tensor: both sides rounded to E4M3, multiplied exactly, summed in
    float32.

    The activation is quantized by vLLM's own `QuantFP8` (PyTorch path, saturating at 448) with the
    checkpoint's `input_scale`, so the values that enter the product are those of a GPU; only the
    order of the sum differs.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        _warn_about_speed("FP8 (W8A8)")

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Run on any CPU."""
        return True, None

    def input_quant_key(self) -> None:
        """Take activations unquantized: only GPUs have fused norm-and-quantize operators."""
        return None

    def get_output_padding(self) -> None:
        """Pad nothing: the base class pads rows for cuBLAS."""
        return None

    def apply_scaled_mm(
        self,
        *,
        A: torch.Tensor,
        B: torch.Tensor,
        out_dtype: torch.dtype,
        As: torch.Tensor,
        Bs: torch.Tensor,
        bias: torch.Tensor | None,
        output_shape: list[int],
    ) -> torch.Tensor:
        """Return (A · As) @ (B · Bs) + bias.

        Args:
            A: E4M3 [tokens, in].
            B: E4M3 [in, out].
            out_dtype: Of the result.
            As: Scale of A, a scalar in float32.
            Bs: Scale of B, a scalar in float32.
            bias: [out], or None.
            output_shape: Shape of the result, [..., out].
        """
        # E4M3 is exact in float32, and the two scales apply to the finished sum, as in a GPU's
        # epilogue.
        scale = As.reshape(()) * Bs.reshape(())
        product = torch.mm(A.to(torch.float32), B.to(torch.float32))
        out = product * scale
        if bias is not None:
            out = out + bias.to(torch.float32)
        return out.to(out_dtype).view(*output_shape)


class ReferenceNvFp4Kernel(EmulationNvFp4LinearKernel):
    """NVFP4 W4A4 by vLLM's own emulation: both sides rounded to E2M1 with their block scales,
    multiplied in BF16.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        _warn_about_speed("NVFP4 (W4A4)")


class ReferenceNvFp4WeightOnlyKernel(NvFp4LinearKernel):
    """Weight-only NVFP4 (W4A16): activations as they come, weights dequantized, products summed in
    float32.

    Codes times block scales are exact in float32, and the global scale applies to the finished sum,
    as in Marlin's kernel on a GPU; only the order of the sum differs.
    """

    def __init__(self, config: NvFp4LinearLayerConfig) -> None:
        super().__init__(config)
        _warn_about_speed("weight-only NVFP4 (W4A16)")

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Run on any CPU."""
        return True, None

    @classmethod
    def can_implement(cls, config: NvFp4LinearLayerConfig) -> tuple[bool, str | None]:
        """Take every layer of the format."""
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Leave the weights as they are in the checkpoint."""

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute x @ weight.T + bias.

        Args:
            layer: With `weight` uint8 [out, in / 2], `weight_scale` E4M3 [out, in / 16] and
                `weight_global_scale` float32 [].
            x: [..., in].
            bias: [out].
        """
        weight = dequantize_to_dtype(
            layer.weight, layer.weight_scale, torch.ones(()), torch.float32, swizzle=False
        )
        global_scale: Any = layer.weight_global_scale
        out = torch.matmul(x.to(torch.float32), weight.t()) * global_scale
        if bias is not None:
            out = out + bias.to(torch.float32)
        return out.to(x.dtype)


def _warn_about_speed(precision: str) -> None:
    logger.warning_once(
        f"hybridquant: {precision} layers run on a REFERENCE kernel, as vLLM has none for this "
        "CPU. The values are right; the speed is not worth measuring."
    )


def static_scaled_fp8_quant(
    input: torch.Tensor,
    scale: torch.Tensor | None = None,
    num_token_padding: int | None = None,
    scale_ub: torch.Tensor | None = None,
    use_per_token_if_dynamic: bool = False,
    output: torch.Tensor | None = None,
    group_shape: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace `vllm._custom_ops.scaled_fp8_quant` where its C++ operator is missing.

    While loading, vLLM calls it to give the three fused q/k/v weights one scale. That needs a
    static scale for the whole tensor and nothing else.

    Raises:
        NotImplementedError: For anything but one static scale.
    """
    if scale is None or scale.numel() != 1 or num_token_padding or scale_ub is not None:
        raise NotImplementedError("reference scaled_fp8_quant: only one static scale per tensor")
    scaled = input.to(torch.float32) / scale.to(torch.float32)
    quantized = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    if output is None:
        return quantized, scale
    output.copy_(quantized)
    return output, scale


def add_missing() -> None:
    """Add a kernel for each format that has none on this CPU; a second call changes nothing.

    Raises:
        AttributeError: This vLLM has no such lists.
    """
    # Trap: the two lists of candidates are private to vLLM. They are read because a kernel that
    # vLLM has itself must not be replaced, and the FP8 list is written because
    # `register_linear_kernel` appends, while vLLM takes the first kernel that supports the device.
    # Symptom where our FP8 kernel is appended: an AMX machine runs W8A16 and FP8 looks better than
    # it is on a GPU.
    nvfp4_kernels = linear._POSSIBLE_NVFP4_KERNELS.get(PlatformEnum.CPU, [])
    if not _any_runs_here(nvfp4_kernels):
        register_linear_kernel(ReferenceNvFp4Kernel, PlatformEnum.CPU, "nvfp4")
    if not _any_runs_here([linear.MarlinNvFp4LinearKernel]):
        # Upstream trap of vLLM 0.32 and 0.33: for weight-only NVFP4, init_nvfp4_linear_kernel takes
        # Marlin without looking at the registered kernels, and loading ends on a CPU with "Forced
        # NVFP4 kernel MarlinNvFp4LinearKernel is not supported". It finds the class by this name.
        linear.MarlinNvFp4LinearKernel = ReferenceNvFp4WeightOnlyKernel
    fp8_kernels = linear._POSSIBLE_FP8_KERNELS.setdefault(PlatformEnum.CPU, [])
    w8a8_kernels = [kernel for kernel in fp8_kernels if _is_w8a8(kernel)]
    if not _any_runs_here(w8a8_kernels):
        fp8_kernels.insert(0, ReferenceFp8Kernel)
    if not _has_fp8_quant():
        _custom_ops.scaled_fp8_quant = static_scaled_fp8_quant


def _is_w8a8(kernel: type) -> bool:
    """Return whether an FP8 kernel of a CPU quantizes activations; vLLM's own do by their names."""
    return "W8A8" in kernel.__name__ or kernel is ReferenceFp8Kernel


def _any_runs_here(kernels: list[Any]) -> bool:
    for kernel in kernels:
        supported, _ = kernel.is_supported()
        if supported:
            return True
    return False


def _has_fp8_quant() -> bool:
    """Return whether the C++ operator behind `scaled_fp8_quant` exists.

    Trap: CPU builds declare it, but without arguments, for GPU passes that look it up by name; only
    its private schema shows that. Symptom of calling it: loading fused FP8 weights ends with
    "static_scaled_fp8_quant() takes 0 positional arguments".
    """
    packet = getattr(torch.ops._C, "static_scaled_fp8_quant", None)
    if packet is None:
        return False
    return len(packet.default._schema.arguments) > 0
