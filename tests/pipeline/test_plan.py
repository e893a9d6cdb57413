"""What a run says and refuses before it starts: here of training, which needs far more memory than
quantizing.
"""

import math
import re
from pathlib import Path

import pytest

from checkpoint.faults import BadInput
from checkpoint.layout import LANGUAGE_MODEL, expected_tensors, language_model_linears, spec_bytes
from pipeline import plan
from pipeline.run import run
from quantize.distill.student import training_bytes
from recipes.schema import load_recipe


@pytest.fixture
def distilling(tiny, tmp_path, monkeypatch):
    """The tiny QAD recipe on short samples; it must not come as far as the model."""
    monkeypatch.setattr("pipeline.run.load_model", interrupt)
    sources = [
        f"{part}.sources=[{{type: synthetic, kinds: {{document: 1}}}}]"
        for part in ("calibrate", "distill")
    ]
    return load_recipe(
        Path("recipes/tiny/nvfp4_qad.yaml"),
        [f"model={tiny}", f"output={tmp_path / 'out'}", *sources],
    )


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_training_is_announced_with_its_size_and_time(distilling, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("pipeline.plan.say", said.append)
    with pytest.raises(KeyboardInterrupt):
        run(distilling)
    # Documents have some 100 tokens, answer included.
    line = r"then 24 linears, 1\.1 million weights, train for \d+ steps of \d+ samples of about 1\d\d tokens:"
    assert re.match(line, said[-1]), said


def test_training_beyond_the_devices_memory_is_refused_before_anything_is_loaded(
    distilling, monkeypatch
):
    monkeypatch.setattr("quantize.distill.distillation.Plan.device_bytes", 10**15)
    with pytest.raises(
        BadInput, match=r"memory of cpu: needs 1000000 GB, .*FSDP2 divides the training"
    ):
        run(distilling)


@pytest.mark.parametrize(("shards", "gigabytes"), [(1, 203), (2, 101), (4, 71), (8, 71)])
def test_memory_of_the_12b_by_processes(full12b, shards, gigabytes):
    """From four on, what counts is that each holds both models whole, the student in float32,
    before FSDP divides.
    """
    language_model = {
        n: s for n, s in expected_tensors(full12b).items() if n.startswith(LANGUAGE_MODEL)
    }
    weights = sum(math.prod(linear.shape) for linear in language_model_linears(full12b))
    needed = training_bytes(spec_bytes(language_model), weights, taught=True, shards=shards)
    assert round(needed / 1e9) == gigabytes


def test_a_gpu_without_mamba_ssms_kernels_is_told_what_that_costs(monkeypatch):
    monkeypatch.setattr(plan, "KERNELS_MISSING", "mamba_ssm is not installed")
    (line,) = plan._kernel_line("cuda:0")
    assert re.fullmatch(
        r".*half as fast.*: mamba_ssm is not installed; `make setup DEVICE=cuda` installs it", line
    )
    assert plan._kernel_line("cpu") == []
    monkeypatch.setattr(plan, "KERNELS_MISSING", None)
    assert plan._kernel_line("cuda") == []
