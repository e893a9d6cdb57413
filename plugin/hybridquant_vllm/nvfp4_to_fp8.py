"""NVFP4 weights to FP8 with one scale per output channel; imports no vLLM.

A weight of NVFP4 is code · block scale · global scale: codes are 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with
a sign, block scales are E4M3. The channel's scale here is the global scale times a power of two, so
that each value in FP8 is code · block scale, moved by some binary places and rounded to the four
significant bits of E4M3:

- A code of one significant bit (0.5, 1, 2, 4) leaves the block scale's bits as they are: exact.
- A code of two (1.5, 3, 6) makes three times the block scale's bits. Of the eight there are, three
  fit into four bits (1.0, 1.25, 1.5), the others are rounded: by 1/21 of the value at most, for
  1.75.
- Values below 2**-6 in FP8, less than a 14,000th of their channel's largest, are rounded to a
  fixed step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes without the sign, which is the fourth bit."""

BLOCK = 16
"""Weights that share a block scale."""

LARGEST_ERROR = 1 / 21
"""Largest relative error of a value that is not subnormal in FP8."""

SMALLEST_NORMAL = 2.0**-6
"""Least value of E4M3 with all its significant bits."""

SUBNORMAL_STEP = 2.0**-9
"""Distance of the values of E4M3 below `SMALLEST_NORMAL`."""

_E4M3 = torch.float8_e4m3fn
_E4M3_MAX = torch.finfo(_E4M3).max

_ROWS = 2048
"""Output channels converted at once: in float32 a layer takes eight times its memory."""


class Fp8Weight(NamedTuple):
    """A weight in FP8.

    Attributes:
        weight: E4M3 [out, in].
        scale: float32 [out, 1]; weight · scale is the weight's value.
    """

    weight: torch.Tensor
    scale: torch.Tensor


def codes_times_blocks(weight: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """Return a weight without its global scale, exactly.

    Args:
        weight: uint8 [out, in / 2], two codes a byte, the first in the lower bits.
        block_scale: E4M3 [out, in / 16].

    Returns:
        float32 [out, in].
    """
    codes = torch.tensor(CODES, dtype=torch.float32, device=weight.device)
    table = torch.cat([codes, -codes])
    both = torch.stack([weight & 0x0F, weight >> 4], dim=-1)
    values = table[both.to(torch.int32)]
    blocks = values.view(weight.shape[0], -1, BLOCK)
    return (blocks * block_scale.to(torch.float32)[..., None]).flatten(1)


def to_fp8(
    weight: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor
) -> Fp8Weight:
    """Convert a weight.

    Args:
        weight: uint8 [out, in / 2].
        block_scale: E4M3 [out, in / 16].
        global_scale: float32, one value.
    """
    outputs = weight.shape[0]
    converted = torch.empty(outputs, 2 * weight.shape[1], dtype=_E4M3, device=weight.device)
    scale = torch.empty(outputs, 1, dtype=torch.float32, device=weight.device)
    for start in range(0, outputs, _ROWS):
        rows = slice(start, start + _ROWS)
        values = codes_times_blocks(weight[rows], block_scale[rows])
        power = _power_of_two(values.abs().amax(dim=1, keepdim=True))
        converted[rows] = (values / power).to(_E4M3)
        scale[rows] = power * global_scale.to(torch.float32)
    return Fp8Weight(converted, scale)


def _power_of_two(largest: torch.Tensor) -> torch.Tensor:
    """Return the least power of two by which a channel is divided to fit into E4M3.

    Args:
        largest: float32 [out, 1], the channels' largest values; 1 is returned for 0.
    """
    mantissa, exponent = torch.frexp(largest / _E4M3_MAX)
    # frexp gives [0.5, 1): an exact power of two needs one less.
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    power = torch.ldexp(torch.ones_like(largest), exponent)
    return torch.where(largest > 0, power, torch.ones_like(power))
