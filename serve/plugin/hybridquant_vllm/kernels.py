"""Reference linear kernels and where they go in vLLM's lists of candidates (written for vLLM 0.32 and 0.33)."""

import torch
from vllm import _custom_ops
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import (
    EmulationNvFp4LinearKernel,
    PerTensorTorchFP8ScaledMMLinearKernel,
    register_linear_kernel,
)
from vllm.platforms import PlatformEnum

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max


class ReferenceFp8Kernel(PerTensorTorchFP8ScaledMMLinearKernel):
    """FP8 W8A8 with one scale a tensor: both sides rounded to E4M3, multiplied exactly, summed in float32.

    The activation is quantized by vLLM's own `QuantFP8` (PyTorch path, saturating at 448) with the checkpoint's
    `input_scale`, so the values that enter the product are those of a GPU; only the order of the sum differs.
    """

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Run on any CPU."""
        return True, None

    def input_quant_key(self) -> None:
        """Take activations unquantized: the fused norm-and-quantize operators exist on GPUs only."""
        return None

    def get_output_padding(self) -> None:
        """Pad nothing: the base class pads rows for the sake of cuBLAS."""
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
        """(A · As) @ (B · Bs) + bias, with A [tokens, in] and B [in, out] in E4M3, As and Bs scalars in float32."""
        # E4M3 is exact in float32, and the two scales apply to the finished sum, as in a GPU's epilogue.
        out = torch.mm(A.to(torch.float32), B.to(torch.float32)) * (As.reshape(()) * Bs.reshape(()))
        if bias is not None:
            out = out + bias.to(torch.float32)
        return out.to(out_dtype).view(*output_shape)


def static_scaled_fp8_quant(
    input: torch.Tensor,
    scale: torch.Tensor | None = None,
    num_token_padding: int | None = None,
    scale_ub: torch.Tensor | None = None,
    use_per_token_if_dynamic: bool = False,
    output: torch.Tensor | None = None,
    group_shape: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand in for `vllm._custom_ops.scaled_fp8_quant` where its C++ operator is missing.

    Loading calls it to give the three fused q/k/v weights one scale, which needs a static scale for the whole tensor
    and nothing else.

    Raises:
        NotImplementedError: For anything but one static scale.
    """
    if scale is None or scale.numel() != 1 or num_token_padding or scale_ub is not None:
        raise NotImplementedError("the reference scaled_fp8_quant knows one static scale a tensor")
    quantized = (input.to(torch.float32) / scale.to(torch.float32)).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    if output is None:
        return quantized, scale
    output.copy_(quantized)
    return output, scale


def add_missing() -> list[str]:
    """Add a kernel for each format that has none on this CPU, and return the formats' names. Safe to call again."""
    added = []
    if not any(_runs_here(kernel) for kernel in linear._POSSIBLE_NVFP4_KERNELS.get(PlatformEnum.CPU, [])):
        register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
        added.append("NVFP4")
    candidates = linear._POSSIBLE_FP8_KERNELS.setdefault(PlatformEnum.CPU, [])
    w8a8 = [kernel for kernel in candidates if "W8A8" in kernel.__name__ or kernel is ReferenceFp8Kernel]
    if not any(_runs_here(kernel) for kernel in w8a8):
        # vLLM takes the first that says it can. PerTensorTorch says so on every CPU, and cannot: see the tests.
        candidates.insert(0, ReferenceFp8Kernel)
        added.append("FP8 W8A8")
    if not hasattr(torch.ops._C, "static_scaled_fp8_quant"):
        _custom_ops.scaled_fp8_quant = static_scaled_fp8_quant
    return added


def _runs_here(kernel: type) -> bool:
    return kernel.is_supported()[0]  # type: ignore[attr-defined]
