"""The facts of an export: from its files, whatever its manifest lacks."""

import json

import pytest

from checkpoint.faults import BadInput
from checkpoint.layout import spec_bytes
from checkpoint.opened import open_checkpoint
from export.publish.errors import weight_errors
from export.publish.facts import read_facts
from export.publish.recorded import recorded_hashes, task_rows
from quantize.formats.registry import FORMATS
from tests.editing import edit_json, edit_tensors

MANIFEST = "hybridquant.json"
MLP = "language_model.backbone.layers.1.mixer.up_proj"


def test_the_stack_is_that_of_the_config(fp8, tiny_config):
    facts = read_facts(fp8)
    assert [layer.kind for layer in facts.layers] == [
        tiny_config.mixer_kind(index) for index in range(tiny_config.depth)
    ]
    assert {layer.formats for layer in facts.layers} == {("FP8",)}
    assert facts.formats == {"FP8": 24}
    assert facts.format_names == "FP8"


def test_sizes_are_the_bytes_of_the_tensors(fp8, tiny):
    facts = read_facts(fp8)
    assert facts.before == spec_bytes(open_checkpoint(tiny).tensors.specs)
    assert facts.after == spec_bytes(open_checkpoint(fp8).tensors.specs)
    by_part = {size.part: (size.before, size.after) for size in facts.sizes}
    assert by_part["vision tower"][0] == by_part["vision tower"][1]
    assert by_part["mlp layers"][1] < 0.51 * by_part["mlp layers"][0]


def test_errors_are_measured_against_the_source(fp8, tiny):
    errors = weight_errors(fp8, tiny)
    facts = read_facts(fp8, errors)
    assert facts.errors_are_measured
    expected = FORMATS["fp8"].relative_error
    for layer in facts.layers:
        assert layer.error == max(errors[linear.name] for linear in layer.linears)
        assert layer.error == pytest.approx(expected, rel=0.2)
    assert not read_facts(fp8).errors_are_measured


def test_a_source_that_lacks_the_weights_is_a_fault(fp8, tiny_copy):
    edit_tensors(tiny_copy, lambda tensors: tensors.pop(f"{MLP}.weight"))
    with pytest.raises(BadInput, match=f"tensor {MLP}.weight is missing"):
        weight_errors(fp8, tiny_copy)


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"recipe": 7, "gate": [], "calibration": "x", "video": None, "files": [], "versions": 1},
        {"gate": {"passed": "yes", "missed": "no", "agreement": [], "tasks": {"a": 1}}},
        {"gate": {"agreement": {"all": {"kl": "NaN"}}, "tasks": [7, {"task": "x"}]}},
        {"video": {"pruning_rate": 7}, "distillation": {"trained": "all"}},
    ],
)
def test_a_manifest_that_lacks_things_or_lies_is_read(fp8_copy, manifest):
    (fp8_copy / MANIFEST).write_text(json.dumps(manifest))
    facts = read_facts(fp8_copy)
    assert facts.gate_passed is None
    assert facts.tasks == facts.agreement == ()
    assert facts.files == {}


def test_numbers_that_are_none_are_no_rows():
    row = {"task": "a", "items": 1, "reference": 0.5, "variant": 0.5}
    assert len(task_rows([row])) == 1
    for broken in ({"reference": "0.5"}, {"variant": None}, {"items": float("nan")}):
        assert task_rows([{**row, **broken}]) == ()


def test_sample_hashes_and_times_are_counted(fp8_copy):
    def add(raw):
        raw["calibration"]["digests"] = ["0" * 64, "1" * 64]
        raw["times"] = {"finished": "2026", "seconds": {"calibrate": 7.5, "broken": "x"}}

    edit_json(fp8_copy / MANIFEST, add)
    facts = read_facts(fp8_copy)
    assert facts.sample_hashes == 2
    assert facts.seconds == {"calibrate": 7.5}
    assert "digests" not in facts.calibration


def test_hashes_are_read_in_both_shapes():
    raw = {"files": {"a": "1" * 64, "b": {"sha256": "2" * 64, "bytes": 3}, "c": 7}}
    assert recorded_hashes(raw) == {"a": "1" * 64, "b": "2" * 64}


def test_a_directory_in_bf16_is_refused(tiny):
    with pytest.raises(BadInput, match="has no quantization_config"):
        read_facts(tiny)


def test_all_samples_come_first(fp8_copy):
    def turn(raw):
        raw["gate"]["agreement"] = dict(reversed(raw["gate"]["agreement"].items()))

    edit_json(fp8_copy / MANIFEST, turn)
    assert read_facts(fp8_copy).agreement[0].group == "all"
