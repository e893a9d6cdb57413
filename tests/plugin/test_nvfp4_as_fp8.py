"""NVFP4 weights as FP8: every code with every block scale. The kernel in vLLM is in
test_in_vllm.py.
"""

import pytest
import torch

from hybridquant_vllm.nvfp4_to_fp8 import (
    CODES,
    LARGEST_ERROR,
    SMALLEST_NORMAL,
    SUBNORMAL_STEP,
    codes_times_blocks,
    to_fp8,
)

GLOBAL_SCALE = torch.tensor(3.1e-5)


def every_value():
    """A weight with each block scale in a row of its own, and all 16 codes in it; in the same rows
    the largest value that there is, so that all share one power of two.
    """
    codes = torch.arange(16, dtype=torch.uint8)
    block = codes[0::2] | (codes[1::2] << 4)
    largest = torch.full((8,), 0x77, dtype=torch.uint8)  # 6 and 6
    positive = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = torch.cat([block, largest]).repeat(len(positive), 1)
    scales = torch.stack([positive.float(), torch.full((len(positive),), 448.0)], dim=1)
    return weight, scales.to(torch.float8_e4m3fn)


def test_values_are_codes_times_block_scales():
    weight, scales = every_value()
    values = codes_times_blocks(weight, scales)
    signed = torch.tensor([*CODES, *(-code for code in CODES)])
    assert torch.equal(values[:, :16], signed * scales[:, :1].float())


def test_the_error_is_within_its_bound():
    weight, scales = every_value()
    exact = codes_times_blocks(weight, scales)
    converted = to_fp8(weight, scales, GLOBAL_SCALE)
    assert converted.weight.dtype == torch.float8_e4m3fn
    power = (converted.scale / GLOBAL_SCALE).round()
    assert torch.equal(power, torch.full_like(power, 8))  # 6 · 448 / 8 is 336, below 448
    error = (converted.weight.float() * power - exact).abs()
    is_normal = exact.abs() / power >= SMALLEST_NORMAL
    relative = (error / exact.abs())[is_normal]
    assert relative.max() == pytest.approx(LARGEST_ERROR, rel=1e-6)
    assert (error / power)[~is_normal].max() <= SUBNORMAL_STEP / 2


def test_codes_of_one_bit_are_exact():
    weight, scales = every_value()
    exact = codes_times_blocks(weight, scales)[:, :16]
    found = to_fp8(weight, scales, torch.tensor(1.0))
    values = (found.weight.float() * found.scale)[:, :16]
    is_one_bit = torch.tensor([code in (0, 0.5, 1, 2, 4) for code in CODES] * 2)
    is_normal = exact.abs() / found.scale >= SMALLEST_NORMAL
    kept = is_one_bit & (is_normal | (exact == 0))
    assert torch.equal(values[kept], exact[kept])
    assert kept.sum() > 800


def test_each_channel_has_a_scale_of_its_own():
    weight = torch.full((3, 8), 0x77, dtype=torch.uint8)
    scales = torch.tensor([[384.0], [0.015625], [0.0]]).to(torch.float8_e4m3fn)
    found = to_fp8(weight, scales, torch.tensor(2.0))
    assert found.scale.shape == (3, 1)
    values = found.weight.float() * found.scale
    assert torch.equal(values, torch.tensor([[4608.0], [0.1875], [0.0]]).expand(3, 16))
    assert torch.equal(found.scale.log2(), found.scale.log2().round())


def test_a_channel_at_the_largest_value_is_not_cut_off():
    # 448 · 1: an exact power of two of E4M3's largest value.
    weight = torch.full((1, 8), 0x22, dtype=torch.uint8)
    found = to_fp8(weight, torch.tensor([[448.0]]).to(torch.float8_e4m3fn), torch.tensor(1.0))
    assert torch.equal(found.weight.float(), torch.full((1, 16), 448.0))
