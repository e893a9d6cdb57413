"""What a run logs and refuses before it starts; training needs far more memory than quantizing."""

import dataclasses
import json
import math
import re

import pytest

from benchmarks import training
from calibrate.sources.jsonl import JsonlSource
from checkpoint.faults import BadInput
from checkpoint.layout import (
    expected_tensors,
    language_model_linears,
    select_prefix,
    spec_bytes,
)
from checkpoint.processes import ALONE
from pipeline import plan
from pipeline.job import open_job
from pipeline.run import run
from quantize.distill.plan import training_bytes
from recipes.loading import SHIPPED, load_recipe


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.fixture
def distilling_on(tiny, tmp_path, monkeypatch):
    """The tiny QAD recipe on samples of one kind; it must not come as far as the model."""
    monkeypatch.setattr("pipeline.whole.load_model", interrupt)

    def load(kind):
        overrides = [f"model={tiny}", f"output={tmp_path / 'out'}"]
        overrides += ["distill.steps=240", "distill.batch=8"]
        for section in ("calibrate", "distill"):
            overrides.append(f"{section}.sources=[{{type: synthetic, kinds: {{{kind}: 1}}}}]")
        return load_recipe(SHIPPED / "tiny" / "nvfp4_qad.yaml", overrides)

    return load


@pytest.fixture
def distilling(distilling_on):
    """The recipe on texts: a thousand samples are shuffled, and pages are slow to draw."""
    return distilling_on("text")


def with_distill(recipe, **changed):
    """A recipe with other settings of its distillation."""
    distill = recipe.distill.model_copy(update=changed)
    return recipe.model_copy(update={"distill": distill})


def test_a_training_is_announced_with_its_size_and_time(distilling_on, caplog):
    distilling = distilling_on("document")
    with caplog.at_level("INFO", logger="hybridquant"), pytest.raises(KeyboardInterrupt):
        run(with_distill(distilling, pack_length=None))
    # Documents have some 100 tokens, answer included.
    trained = r"then 61 tensors, 1\.\d million weights, train for \d+ steps"
    samples = r"of \d+ samples of about 1\d\d tokens:"
    assert any(re.match(rf"{trained} {samples}", message) for message in caplog.messages)


def test_packed_rows_are_announced_with_their_samples(distilling_on, caplog):
    distilling = distilling_on("document")
    with caplog.at_level("INFO", logger="hybridquant"), pytest.raises(KeyboardInterrupt):
        run(distilling)
    rows = "240 steps of 8 rows of 4,096 tokens, each about"
    (line,) = [message for message in caplog.messages if rows in message]
    assert training._PLANNED.search(line)
    assert 20 < int(re.search(r"each about (\d+) samples", line)[1]) < 40


def write_samples(path, count):
    line = json.dumps({"messages": [{"role": "user", "content": "What is two and two?"}]})
    path.write_text(f"{line}\n" * count)


def planned(tiny, tmp_path, samples):
    """The plan of a run layer by layer on five samples, and its lines."""
    write_samples(tmp_path / "five.jsonl", 5)
    source = f"[{{type: jsonl, path: {tmp_path / 'five.jsonl'}}}]"
    overrides = [f"model={tiny}", f"output={tmp_path / 'out'}", "accuracy.tasks=null"]
    overrides += [f"calibrate.sources={source}", f"accuracy.sources={source}"]
    overrides += [f"calibrate.samples={samples}", f"accuracy.samples={samples}"]
    overrides.append("quantize.memory=layers")
    job = open_job(load_recipe(SHIPPED / "tiny" / "fp8.yaml", overrides), "cpu", ALONE)
    return plan._measure_needs(job), plan.make_plan(job).lines


def test_the_plan_follows_the_samples_that_the_sources_hold(tiny, tmp_path):
    few, lines = planned(tiny, tmp_path, 1024)
    exact, _ = planned(tiny, tmp_path, 5)
    assert few.samples == 5
    assert few.activations == exact.activations
    assert any(line.startswith("5 of the 1,024 samples of about") for line in lines)


def test_more_processes_than_samples_are_refused_by_the_plan(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "available_samples", lambda section: 1)
    two = dataclasses.replace(ALONE, count=2)
    recipe = load_recipe(
        SHIPPED / "tiny" / "fp8.yaml", [f"model={tiny}", f"output={tmp_path / 'out'}"]
    )
    with pytest.raises(BadInput, match=r"calibrate\.samples: 1 samples for 2 processes"):
        plan.make_plan(open_job(recipe, "cpu", two))


def test_training_beyond_the_devices_memory_is_refused_before_anything_is_loaded(
    distilling, monkeypatch
):
    monkeypatch.setattr("pipeline.plan.device_available", lambda device: 10_000_000)
    message = r"memory of cpu: needs .* GB, 0\.01 GB are free .*FSDP2 divides the training"
    with pytest.raises(BadInput, match=message):
        run(distilling)


@pytest.mark.parametrize(("share", "is_said"), [(0.93, True), (0.85, False)])
def test_a_peak_that_nearly_fills_the_memory_is_said(
    distilling, caplog, monkeypatch, share, is_said
):
    peak = open_job(distilling, "cpu", ALONE).distillation.peak_bytes
    monkeypatch.setattr(plan, "device_available", lambda device: int(peak / share))
    with caplog.at_level("INFO", logger="hybridquant"), pytest.raises(KeyboardInterrupt):
        run(distilling)
    assert ("the peak is 93% of the memory" in caplog.text) == is_said
    assert ("may be more than there is" in caplog.text) == is_said


def test_sources_that_are_all_held_out_are_refused_before_anything_is_loaded(distilling, tmp_path):
    samples = tmp_path / "five.jsonl"
    line = json.dumps({"messages": [{"role": "user", "content": "A question?"}]})
    samples.write_text("\n".join([line] * 5))
    sources = (JsonlSource(type="jsonl", path=samples),)
    message = r"distill\.sources: hold 5 samples, and distill\.held_out keeps 5 apart"
    with pytest.raises(BadInput, match=message):
        run(with_distill(distilling, sources=sources, held_out=5))
    with pytest.raises(KeyboardInterrupt):  # it comes as far as the model
        run(with_distill(distilling, sources=sources, held_out=4))


def test_a_generator_of_samples_that_are_all_too_long_is_not_drawn_from_forever(distilling):
    message = "samples cannot be used"
    with pytest.raises(BadInput, match=message):
        run(with_distill(distilling, max_length=16))


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
