"""BF16 products on a CPU in float32: the same values, up to the order of the sums."""

import pytest
import torch
import torch.nn.functional as F

from checkpoint.products import float32_products


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def convolved():
    return F.conv1d(drawn(1, 6, 20), drawn(6, 1, 4), drawn(6), padding=3, groups=6)


def multiplied():
    return F.linear(drawn(5, 64), drawn(7, 64))


def attended():
    return F.scaled_dot_product_attention(*drawn(3, 1, 2, 30, 16), is_causal=True)


@pytest.mark.parametrize("compute", [convolved, multiplied, attended])
def test_products_are_rounded_to_bf16_as_they_were(compute):
    expected = compute()
    with float32_products():
        found = compute()
    assert found.dtype == torch.bfloat16
    # One step of BF16 at most: sums in another order may round to the neighbour.
    assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=2**-6)


def test_a_product_is_computed_in_float32_and_its_gradients_are_bf16():
    linear = torch.nn.Linear(64, 7, bias=False, dtype=torch.bfloat16)
    values = drawn(5, 64).requires_grad_(True)
    with float32_products():
        result = linear(values)
    exact = (values.float() @ linear.weight.float().T).bfloat16()
    assert torch.equal(result, exact)
    result.sum().backward()
    assert values.grad.dtype == torch.bfloat16
    assert linear.weight.grad.dtype == torch.bfloat16


def test_float32_stays_and_the_functions_are_put_back():
    before = (F.linear, F.conv1d)
    with float32_products():
        assert F.linear(torch.ones(1, 2), torch.ones(3, 2)).dtype == torch.float32
    assert (F.linear, F.conv1d) == before
