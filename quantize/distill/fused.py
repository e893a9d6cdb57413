"""The elementwise work of the language model's layers, compiled into few GPU kernels.

transformers computes a norm, an activation or a convolution in up to ten kernels, each of which
reads and writes the whole row. torch.compile makes one of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.activations import ReLUSquaredActivation
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from checkpoint.libraries import find_mamba_kernels, language_model_classes

_ROUNDED: dict[str, Any] = {"emulate_precision_casts": True}
"""Round to BF16 where the layers do. torch.compile would keep float32 from one operation to the
next, and a quarter of the results would be other numbers than those that were calibrated on.
"""

_Forward = Callable[..., torch.Tensor]


@contextlib.contextmanager
def fused_elementwise() -> Iterator[None]:
    """Compile the norms and the activation of every language model in this process.

    It is done where mamba_ssm's kernels run, which need what torch.compile needs: CUDA and a C
    compiler. What is compiled is transformers' own code, as a function of what it reads: all layers
    share it, where a method would be compiled for each layer.
    """
    if find_mamba_kernels() is not None:
        yield
        return
    makers: dict[Any, Callable[[_Forward], _Forward]] = {
        language_model_classes().NemotronHRMSNorm: _compiled_norm,
        Zamba2RMSNormGated: _compiled_gated_norm,
        ReLUSquaredActivation: _compiled_activation,
    }
    originals = {}
    for kind, compiled in makers.items():
        originals[kind] = kind.forward
        kind.forward = compiled(kind.forward)
    try:
        yield
    finally:
        for kind, forward in originals.items():
            kind.forward = forward


@dataclass
class _Norm:
    """What transformers' norms read of themselves."""

    weight: torch.Tensor
    variance_epsilon: float
    group_size: int | None = None


# Trap of torch.compile: functions made by one `def` share a limit of 8 compilations, after which
# they are no longer compiled. So each kind has its own.


def _compiled_norm(forward: _Forward) -> _Forward:
    @partial(torch.compile, options=_ROUNDED)
    def compute(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        return forward(_Norm(weight, epsilon), hidden)

    def norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
        _mark_length(hidden)
        return compute(hidden, module.weight, module.variance_epsilon)

    return norm


def _compiled_gated_norm(forward: _Forward) -> _Forward:
    @partial(torch.compile, options=_ROUNDED)
    def compute(
        hidden: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, epsilon: float, group: int
    ) -> torch.Tensor:
        return forward(_Norm(weight, epsilon, group), hidden, gate)

    def gated_norm(module: Any, hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        _mark_length(hidden, gate)
        return compute(hidden, gate, module.weight, module.variance_epsilon, module.group_size)

    return gated_norm


def _compiled_activation(forward: _Forward) -> _Forward:
    @partial(torch.compile, options=_ROUNDED)
    def compute(hidden: torch.Tensor) -> torch.Tensor:
        return forward(None, hidden)

    def activation(module: Any, hidden: torch.Tensor) -> torch.Tensor:
        _mark_length(hidden)
        return compute(hidden)

    return activation


def _mark_length(*tensors: torch.Tensor, dim: int = 1) -> None:
    """Say that the length differs from row to row, so that the first is not compiled for itself."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def compiled_convolution() -> Callable[..., torch.Tensor]:
    """Return `convolved_row`, compiled."""
    compute = torch.compile(convolved_row, options=_ROUNDED)

    def convolve(
        channels: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        offsets: torch.Tensor,
    ) -> torch.Tensor:
        _mark_length(channels, dim=2)
        _mark_length(offsets, dim=0)
        return compute(channels, weight, bias, offsets)

    return convolve


def convolved_row(
    channels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor
) -> torch.Tensor:
    """Convolve causally along a row in which several samples follow each other, then apply SiLU.

    Args:
        channels: [1, channels, length].
        weight: [channels, width].
        bias: [channels], or None.
        offsets: int64 [length]: the place of each token in its sample. A token sees no more tokens
            before it than that.

    Returns:
        [1, channels, length] in the dtype of `channels`, summed in float32.
    """
    length = channels.shape[-1]
    width = weight.shape[-1]
    values = channels.float()
    total = values * weight[:, -1:].float()
    for back in range(1, width):
        earlier = nn.functional.pad(values, (back, 0))[..., :length]
        earlier = torch.where(offsets >= back, earlier, 0.0)
        total = total + earlier * weight[:, width - 1 - back, None].float()
    if bias is not None:
        total = total + bias[:, None].float()
    return nn.functional.silu(total.to(channels.dtype))
