"""The scan by groups against transformers' own."""

import pytest
import torch

from checkpoint.libraries import language_model_classes
from checkpoint.scan import grouped_scan, scan_by_groups

BATCH, HEADS, WIDTH, GROUPS, STATE, CHUNK = 2, 6, 4, 2, 8, 16


def drawn(length, dtype=torch.float32):
    torch.manual_seed(length)
    sizes = {
        "states": (BATCH, length, HEADS, WIDTH),
        "steps": (BATCH, length, HEADS),
        "into": (BATCH, length, GROUPS, STATE),
        "out_of": (BATCH, length, GROUPS, STATE),
    }
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in sizes.items()}
    tensors["decay"] = -torch.rand(HEADS) * 4
    return {name: tensor.requires_grad_(True) for name, tensor in tensors.items()}


def scanned(scan, given, **options):
    order = [given[name] for name in ("states", "steps", "decay", "into", "out_of")]
    torch.manual_seed(1)
    weights = {"D": torch.rand(HEADS), "dt_bias": torch.randn(HEADS)}
    return scan(*order, chunk_size=CHUNK, dt_softplus=True, **weights, **options)


@pytest.mark.parametrize("length", [5, 16, 50])
def test_results_states_and_gradients_are_those_of_transformers(length):
    original = language_model_classes().mamba2_chunk_scan
    found = {}
    for scan in (original, scan_by_groups):
        given = drawn(length)
        result, last = scanned(scan, given, return_final_states=True)
        (result.sin().sum() + last.cos().sum()).backward()
        found[scan] = [result, last, *(tensor.grad for tensor in given.values())]
    for theirs, ours in zip(found[original], found[scan_by_groups], strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_bf16_is_rounded_where_transformers_rounds_it():
    given = drawn(40, torch.bfloat16)
    theirs = scanned(language_model_classes().mamba2_chunk_scan, given)
    ours = scanned(scan_by_groups, given)
    assert ours.dtype == theirs.dtype
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_state_that_is_given_is_left_to_transformers():
    modeling = language_model_classes()
    original = modeling.mamba2_chunk_scan
    given = drawn(8)
    start = torch.randn(BATCH, HEADS, WIDTH, STATE)
    expected = scanned(original, given, initial_states=start)
    with grouped_scan():
        assert torch.equal(
            scanned(modeling.mamba2_chunk_scan, given, initial_states=start), expected
        )
        assert not torch.equal(scanned(modeling.mamba2_chunk_scan, given), expected)
    assert modeling.mamba2_chunk_scan is original
