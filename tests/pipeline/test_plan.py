"""What a run logs and refuses before it starts; training needs far more memory than quantizing."""

import math
import re

import pytest

from checkpoint.faults import BadInput
from checkpoint.layout import (
    expected_tensors,
    language_model_linears,
    select_prefix,
    spec_bytes,
)
from pipeline import plan
from pipeline.run import run
from quantize.distill.plan import training_bytes
from recipes.loading import SHIPPED, load_recipe


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.fixture
def distilling(tiny, tmp_path, monkeypatch):
    """The tiny QAD recipe on short samples; it must not come as far as the model."""
    monkeypatch.setattr("pipeline.whole.load_model", interrupt)
    overrides = [f"model={tiny}", f"output={tmp_path / 'out'}"]
    for section in ("calibrate", "distill"):
        sources = "[{type: synthetic, kinds: {document: 1}}]"
        overrides.append(f"{section}.sources={sources}")
    return load_recipe(SHIPPED / "tiny" / "nvfp4_qad.yaml", overrides)


def test_a_training_is_announced_with_its_size_and_time(distilling, caplog):
    with caplog.at_level("INFO", logger="hybridquant"), pytest.raises(KeyboardInterrupt):
        run(distilling)
    # Documents have some 100 tokens, answer included.
    trained = r"then 24 linears, 1\.1 million weights, train for \d+ steps"
    samples = r"of \d+ samples of about 1\d\d tokens:"
    assert any(re.match(rf"{trained} {samples}", message) for message in caplog.messages)


def test_training_beyond_the_devices_memory_is_refused_before_anything_is_loaded(
    distilling, monkeypatch
):
    monkeypatch.setattr("pipeline.plan.device_available", lambda device: 10_000_000)
    message = r"memory of cpu: needs .* GB, 0\.01 GB are free .*FSDP2 divides the training"
    with pytest.raises(BadInput, match=message):
        run(distilling)


@pytest.mark.parametrize(("shards", "gigabytes"), [(1, 203), (2, 101), (4, 71), (8, 71)])
def test_memory_of_the_12b_by_processes(full12b, shards, gigabytes):
    """From four on, what counts is that each process loads both models before FSDP divides them."""
    specs = select_prefix(expected_tensors(full12b), full12b.family.language_model)
    weights = sum(math.prod(linear.shape) for linear in language_model_linears(full12b))
    needed = training_bytes(spec_bytes(specs), weights, is_taught=True, shards=shards)
    assert round(needed / 1e9) == gigabytes


def test_a_gpu_without_mamba_ssms_kernels_is_told_what_that_costs(monkeypatch):
    monkeypatch.setattr(plan, "find_mamba_kernels", lambda: "mamba_ssm is not installed")
    (line,) = plan.kernel_lines("cuda:0")
    remedy = "mamba_ssm is not installed; `make setup DEVICE=cuda` installs it"
    assert re.fullmatch(rf".*half as fast.*: {remedy}", line)
    assert plan.kernel_lines("cpu") == []
    monkeypatch.setattr(plan, "find_mamba_kernels", lambda: None)
    assert plan.kernel_lines("cuda") == []
