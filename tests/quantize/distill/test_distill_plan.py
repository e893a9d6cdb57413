"""The plan of a distillation: its faults are reported together, its disk is counted before."""

import math
import shutil

import pytest

from checkpoint.faults import BadInput
from checkpoint.layout import expected_tensors, select_prefix, spec_bytes
from checkpoint.opened import Checkpoint
from checkpoint.processes import Processes
from pipeline.plan import row_faults
from quantize.distill.plan import (
    activation_bytes,
    gathered_bytes,
    state_bytes,
    training_bytes,
)
from quantize.distill.settings import Distill
from recipes.loading import SHIPPED, load_recipe
from tests.quantize.distill.distilling import Small, one_thread, small_plan  # noqa: F401
from tiny.checkpoint import write_tiny

RECIPE = SHIPPED / "tiny/nvfp4_qad.yaml"


def test_faults_of_the_plan_are_reported_together(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(BadInput) as caught:
        small_plan(tiny, tmp_path, processes=Processes(0, 3), train="lm_head", batch=4)
    faults = {fault.where: fault for fault in caught.value.faults}
    assert list(faults) == ["distill.train", "distill.batch", "accelerate"]
    assert "o_proj" in faults["distill.train"].remedy
    assert faults["distill.batch"].what == "4 is not a multiple of 3 processes"


def test_a_gpu_that_training_would_not_take_is_refused(tiny, tmp_path):
    with pytest.raises(BadInput, match="device: 'cuda:1': training takes the first GPU"):
        small_plan(tiny, tmp_path, device="cuda:1")


def test_the_rates_are_the_settings_or_the_videos(tiny, tmp_path):
    assert small_plan(tiny, tmp_path).rates == (0.9,)
    plan = small_plan(tiny, tmp_path, video_pruning_rates=(0.0, 0.5))
    assert plan.rates == (0.0, 0.5)


def test_a_disk_too_small_ends_the_run_before_training_with_the_figures(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr("checkpoint.atomic.free_bytes", lambda path: 2_000_000)
    what = r"distill: needs 0\.\d\d GB for checkpoints of the training, 0\.00 GB are free"
    with pytest.raises(BadInput, match=what):
        small_plan(tiny, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["steps", "batch", "pack_length", "held_out"])
def test_a_number_far_beyond_any_training_is_refused_in_the_recipe(field):
    """The samples of a pass, their product, fit the 64 bits that libraries count with."""
    with pytest.raises(BadInput, match=rf"distill\.{field}: is {2**63 - 1}: should be less than"):
        load_recipe(RECIPE, [f"distill.{field}={2**63 - 1}"])
    largest = Distill(steps=10**7, batch=10**6, pack_length=2**24, held_out=10**6)
    assert largest.samples < 2**63


def test_packed_rows_that_cannot_fit_are_refused_and_single_samples_may_be_short():
    (fault,) = row_faults(2**24, peak=21 * 10**9, available=10 * 10**9)
    assert str(fault) == (
        "distill.pack_length: rows of 16,777,216 tokens need about 21 GB, 10 GB are free "
        "(lower it, or start more processes)"
    )
    assert not list(row_faults(None, 21 * 10**9, 10 * 10**9))
    assert not list(row_faults(2**24, 19 * 10**9, 10 * 10**9))


def test_what_an_earlier_run_has_left_counts_as_free(tiny, tmp_path, monkeypatch):
    needed = small_plan(tiny, tmp_path).state_bytes
    monkeypatch.setattr("checkpoint.atomic.free_bytes", lambda path: needed // 2)
    with pytest.raises(BadInput, match="are free"):
        small_plan(tiny, tmp_path)
    left = tmp_path / "distill" / "checkpoint-1"
    left.mkdir(parents=True)
    (left / "weights").write_bytes(bytes(needed // 2 + 2**21 + needed // 50))
    small_plan(tiny, tmp_path)


def test_the_largest_state_is_what_was_counted(tmp_path):
    # Random weights gain from a few steps; only what is better than PTQ is kept as the best.
    write_tiny(tmp_path / "bf16", trained=False)
    sizes = []

    def measure(step):
        files = [path for path in (tmp_path / "distill").rglob("*") if path.is_file()]
        sizes.append(sum(path.stat().st_size for path in files))

    small = Small(tmp_path / "bf16", tmp_path, record=measure, steps=3, learning_rate=3e-5)
    assert small.run().best_step > 0
    layout = small.checkpoint.layout
    weights = sum(
        math.prod(spec.shape) for name, spec in layout.items() if name.startswith("language_model.")
    )
    assert small.plan.weight_count == weights
    assert 0.98 < max(sizes) / small.plan.state_bytes <= 1.02
    shutil.rmtree(small.plan.directory)


def test_a_sharded_run_keeps_the_language_model_in_its_checkpoints(tiny, tmp_path, monkeypatch):
    alone = small_plan(tiny, tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sharded = small_plan(tiny, tmp_path, processes=Processes(0, 2))
    assert alone.state_bytes == state_bytes(alone.weight_count)
    assert sharded.state_bytes > alone.state_bytes + 4 * alone.weight_count
    assert sharded.device_bytes < alone.device_bytes


def test_memory_is_divided_by_fsdp_but_never_less_than_what_is_loaded():
    gb = 10**9
    assert training_bytes(20 * gb, 10 * gb, True, shards=1) == 180 * gb
    assert training_bytes(20 * gb, 10 * gb, True, shards=2) == 90 * gb
    assert training_bytes(20 * gb, 10 * gb, True, shards=8) == 60 * gb
    assert training_bytes(20 * gb, 10 * gb, False, shards=1) == 160 * gb


@pytest.mark.parametrize(("tokens", "measured"), [(1959, 60.7e9), (7901, 66.3e9)])
def test_memory_is_what_two_h100s_measured(full12b, tokens, measured):
    """training_12b_2gpu.json: the linears named down_proj train, layers are checkpointed."""
    family = full12b.family
    layout = expected_tensors(full12b)
    model = spec_bytes(select_prefix(layout, family.language_model))
    trained = {name for name in layout if name.endswith("down_proj.weight")}
    weights = sum(math.prod(layout[name].shape) for name in trained)
    activations = activation_bytes(full12b, tokens, gradient_checkpointing=True)
    planned = training_bytes(model, weights, True, shards=2, activations=activations)
    planned += gathered_bytes(Checkpoint(full12b, None), trained, is_taught=True)
    assert planned == pytest.approx(measured, rel=0.1)


def test_a_token_adds_the_memory_that_two_h100s_measured(full12b):
    more, fewer = (activation_bytes(full12b, tokens, True) for tokens in (7901, 1959))
    assert more - fewer == pytest.approx(66.3e9 - 60.7e9, rel=0.1)


@pytest.mark.parametrize(
    ("tokens", "gradient_checkpointing", "measured"),
    [(4096, False, 4.1e9), (4096, False, 4.2e9), (12288, True, 3.2e9), (12288, True, 3.5e9)],
)
def test_rows_without_kernels_need_what_an_h100_measured(
    tiny, tmp_path, monkeypatch, tokens, gradient_checkpointing, measured
):
    """qad_choice_long_h100.json: packed rows of the tiny checkpoint, all weights train."""
    monkeypatch.setattr("quantize.distill.plan.find_mamba_kernels", lambda: "not installed")
    settings = {"pack_length": tokens, "gradient_checkpointing": gradient_checkpointing}
    plan = small_plan(tiny, tmp_path, train="all", max_length=4096, **settings)
    assert plan.peak_bytes == pytest.approx(measured, rel=0.1)


def test_checkpointed_layers_need_less(full12b):
    kept = activation_bytes(full12b, 16384, gradient_checkpointing=False)
    assert activation_bytes(full12b, 16384, gradient_checkpointing=True) < kept / 3


def names(tiny, tmp_path, chosen):
    return set(small_plan(tiny, tmp_path, train=chosen).trained)


def test_what_trains_is_all_the_linears_or_some(tiny, tmp_path):
    everything = names(tiny, tmp_path, "all")
    linears = names(tiny, tmp_path, "linears")
    assert linears < everything
    for part in ("embeddings.weight", "norm_f.weight", "lm_head.weight", "A_log", "dt_bias", ".D"):
        assert any(name.endswith(part) for name in everything - linears), part
    assert any(name.endswith("conv1d.bias") for name in everything - linears)
    assert all(name.startswith("language_model.") for name in everything)
    assert names(tiny, tmp_path, "*") == linears
    assert {name.split(".")[-2] for name in names(tiny, tmp_path, "o_proj")} == {"o_proj"}
