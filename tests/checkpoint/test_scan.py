"""The grouped scan against transformers' own fallback, argument for argument."""

import pytest
import torch
from transformers.models.nemotron_h import modeling_nemotron_h as native

from checkpoint.scan import grouped_scan


@pytest.mark.parametrize("length", [1, 31, 32, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_output_and_state(length, dtype):
    random = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    items, heads, width, groups, state = 2, 8, 16, 2, 64
    tensors = [normal(items, length, heads, width), normal(items, length, heads) - 2]
    tensors += [normal(items, length, groups, state) for _ in range(2)]
    x, dt, b, c = (tensor.to(dtype) for tensor in tensors)
    given = {"D": normal(heads), "dt_bias": normal(heads), "dt_softplus": True, "return_final_states": True}
    for before in (None, normal(items, heads, width, state)):
        arguments = (x, dt, -8 * torch.rand(heads, generator=random), b, c, 128)
        expected = native.mamba2_chunk_scan.__wrapped__(*arguments, initial_states=before, **given)
        found = grouped_scan(*arguments, initial_states=before, **given)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
