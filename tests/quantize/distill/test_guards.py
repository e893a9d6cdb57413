"""Each guard of a distillation, with what it guards from."""

import itertools
import math

import pytest
import torch

from checkpoint.faults import BadInput
from checkpoint.libraries import language_model_classes
from quantize.distill import student as student_module
from quantize.distill.weights import Weight
from tests.quantize.distill.distilling import (  # noqa: F401
    Small,
    one_thread,
    text_sample,
    texts,
)


def fused(projected, *_, outproj_weight, **__):
    """Stands in for mamba_ssm's kernel: takes out_proj's weight as it is."""
    width = outproj_weight.shape[1]
    return torch.nn.functional.linear(projected[..., :width], outproj_weight.to(projected.dtype))


def test_the_fused_mamba_path_is_not_taken(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model_classes(), "mamba2_split_conv1d_scan_combined", fused)
    result = Small(tiny, tmp_path, steps=1).run()
    assert result.losses[0][1] < 1


def test_a_quantizer_that_a_step_does_not_call_stops_the_run_by_name(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model_classes(), "mamba2_split_conv1d_scan_combined", fused)
    monkeypatch.setattr(student_module, "unfuse_mamba", lambda model: [])
    with pytest.raises(
        RuntimeError, match=r"did not call .*layers\.0\.mixer\.out_proj\.input_quantizer"
    ):
        Small(tiny, tmp_path, steps=1).run()


@pytest.mark.parametrize(
    ("name", "trains", "message"),
    [
        ("model.layers.1.mixer.up_proj", False, r"no gradient at .*layers\.1\.mixer\.up_proj"),
        ("model.norm_f", True, r"one too many at .*norm_f\.weight"),
    ],
)
def test_a_gradient_that_is_missing_or_in_excess_stops_the_run(
    tiny, tmp_path, monkeypatch, name, trains, message
):
    unfuse_mamba = student_module.unfuse_mamba

    def disturb(model):
        Weight(model.get_submodule(name), "weight").parameter.requires_grad_(trains)
        return unfuse_mamba(model)

    monkeypatch.setattr(student_module, "unfuse_mamba", disturb)
    with pytest.raises(RuntimeError, match=message):
        Small(tiny, tmp_path, steps=1, train="linears").run()


def test_a_range_that_changes_stops_the_run(tiny, tmp_path):
    small = Small(tiny, tmp_path, steps=1)
    quantizer = small.student.get_submodule("model.layers.0.mixer.in_proj.input_quantizer")

    def samples(skipped):
        yield from itertools.islice(texts(), 2)
        quantizer.amax.mul_(2)  # behind the held-out samples, and so in the training
        yield from itertools.islice(texts(), 2, None)

    small.plan = small.plan_with(samples)
    with pytest.raises(RuntimeError, match=r"changed the ranges .*in_proj\.input_quantizer"):
        small.run()


@pytest.mark.parametrize("patience", [1, 2])
def test_a_learning_rate_far_too_high_stops_the_run_with_advice(tiny, tmp_path, patience):
    message = rf"above PTQ's .* nats {patience} times in a row.*learning_rate first"
    with pytest.raises(BadInput, match=message):
        Small(tiny, tmp_path, steps=4, learning_rate=0.1, patience=patience).run()


@pytest.mark.parametrize("save_every", [1, 9])
def test_weights_that_overflow_stop_the_run_with_advice(tiny, tmp_path, save_every):
    settings = {"steps": 2, "learning_rate": 1e300, "save_every": save_every, "warmup": 0}
    message = r"is nan after [12] steps \(lower distill\.learning_rate first"
    with pytest.raises(BadInput, match=message):
        Small(tiny, tmp_path, **settings).run()


def broken_at(number, small):
    """Samples of which one holds a word whose embedding is NaN."""
    ids = small.checkpoint.tokenizer.encode("§", add_special_tokens=False)
    small.student.get_input_embeddings().weight.data[ids] = math.nan

    def samples(skipped):
        for index in itertools.count():
            yield text_sample(index, "§" if index == number else "Sentence")

    return samples


def test_nan_in_a_step_stops_the_run_with_advice(tiny, tmp_path):
    small = Small(tiny, tmp_path, steps=1)
    small.plan = small.plan_with(broken_at(2, small))
    with pytest.raises(BadInput, match=r"loss is nan after 0 steps.*look at the samples"):
        small.run()


@pytest.mark.parametrize(("loss", "name"), [("kl", "KL"), ("cross_entropy", "cross-entropy")])
def test_nan_on_the_held_out_samples_stops_the_run_with_advice(tiny, tmp_path, loss, name):
    small = Small(tiny, tmp_path, steps=1, loss=loss)
    small.plan = small.plan_with(broken_at(0, small))
    message = rf"held-out {name} is nan after 0 steps \(no weight has changed yet: look at the"
    with pytest.raises(BadInput, match=message):
        small.run()
