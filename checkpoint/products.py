"""BF16 products on a CPU, computed in float32.

torch has slow BF16 kernels for CPUs without BF16 arithmetic, and computes a depthwise convolution
channel by channel on all of them. Values, products and sums are the same in float32, which is also
what those kernels add up in; only the order of the sums differs. Attention also keeps its weights
in float32 instead of BF16.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

_PRODUCTS = ("linear", "conv1d", "scaled_dot_product_attention")
"""Functions of torch.nn.functional."""


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Compute products of BF16 tensors on the CPU in float32 and round the result to BF16.

    Modules call these functions by their names in torch.nn.functional, where they are replaced. A
    `TorchFunctionMode` would not reach what is computed again in a backward.

    Trap of torch.compile: it reads the names of all functions there, so a `partial` will not do.
    """
    before = {name: getattr(F, name) for name in _PRODUCTS}
    for name, function in before.items():
        setattr(F, name, _in_float32_on_a_cpu(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)


def _in_float32_on_a_cpu(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(function)
    def product(values: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        if values.dtype != torch.bfloat16 or values.device.type != "cpu":
            return function(values, *others, **options)
        given = [_in_float32(value) for value in others]
        named = {name: _in_float32(value) for name, value in options.items()}
        return function(values.float(), *given, **named).to(torch.bfloat16)

    return product


def _in_float32(value: Any) -> Any:
    is_bfloat16 = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
    return value.float() if is_bfloat16 else value
