"""Weights and ranges: saved, loaded, and shared by processes."""

import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from safetensors import safe_open

from checkpoint.processes import ALONE, Processes
from quantize.distill.weights import (
    load_ranges,
    load_weights,
    ranges_of,
    save_weights,
    share_ranges,
)
from tests.quantize.distill.distilling import Small, one_thread  # noqa: F401


def shared(index, rendezvous):
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous.as_uri(), rank=index, world_size=2
    )
    model = torch.nn.Module()
    model.quantizer = TensorQuantizer(amax=1.0 + index)
    model.without_range = TensorQuantizer()
    model.register_buffer("other", torch.tensor(1.0 + index))
    share_ranges(model, Processes(index, 2))
    assert model.quantizer.amax == 1.0
    assert model.other == 1.0 + index


@pytest.mark.usefixtures("one_thread")
def test_every_process_takes_the_first_ones_ranges(tmp_path):
    """Each calibrates for itself, and GPUs may differ in a bit."""
    # Forked, because a new interpreter would import ModelOpt again.
    torch.multiprocessing.start_processes(
        shared, (tmp_path / "rendezvous",), nprocs=2, start_method="fork"
    )


@pytest.fixture(scope="module")
def trained(one_thread, tiny, tmp_path_factory):  # noqa: F811
    return Small(tiny, tmp_path_factory.mktemp("weights"), train="o_proj").trained


def snapshot(trained):
    values = {name: amax.clone() for name, amax in ranges_of(trained.linears).items()}
    weights = {name: weight.parameter.clone() for name, weight in trained.weights.items()}
    return values | weights


def change(trained):
    for weight in trained.weights.values():
        weight.parameter.data.add_(1)
    for amax in ranges_of(trained.linears).values():
        amax.mul_(2)


def test_what_is_saved_is_loaded_with_its_step(trained, tmp_path):
    before = snapshot(trained)
    path = tmp_path / "new" / "weights.safetensors"
    save_weights(trained, path, 7, ALONE)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    change(trained)
    assert load_weights(trained, path) == 7
    after = snapshot(trained)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_ranges_are_loaded_without_the_weights(trained, tmp_path):
    before = snapshot(trained)
    path = tmp_path / "weights.safetensors"
    save_weights(trained, path, 7, ALONE)
    change(trained)
    load_ranges(trained.linears, path)
    after = snapshot(trained)
    equal = {name for name in before if torch.equal(before[name], after[name])}
    assert equal == set(ranges_of(trained.linears))
    load_weights(trained, path)


def test_only_the_first_process_writes(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    save_weights(trained, tmp_path / "second", 7, Processes(1, 2))
    assert list(tmp_path.iterdir()) == []
    save_weights(trained, tmp_path / "first", 7, Processes(0, 2))
    with safe_open(tmp_path / "first", framework="pt") as file:
        names = set(file.keys())
    assert names == set(trained.weights) | set(ranges_of(trained.linears))
