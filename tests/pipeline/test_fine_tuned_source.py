"""A source that fine-tuning has saved in float32: its export is that of the BF16 it rounds to."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.faults import BadInput
from checkpoint.opened import open_bf16
from export.verify import verify
from pipeline.run import run
from recipes.loading import SHIPPED, load_recipe
from tests.editing import cast_weights, edit_json, edit_tensors

FEW = ["calibrate.samples=2", "accuracy.samples=1", "accuracy.tasks=null"]
NORM = "language_model.backbone.norm_f.weight"
LINEAR = "language_model.backbone.layers.1.mixer.up_proj.weight"


@pytest.fixture(scope="module")
def sources(tiny, tmp_path_factory):
    """The directory of a float32 checkpoint, and that of the BF16 one it rounds to."""
    folder = tmp_path_factory.mktemp("fine-tuned")
    trained = shutil.copytree(tiny, folder / "float32")
    cast_weights(trained, "float32")
    edit_json(trained / "config.json", lambda raw: raw.update(torch_dtype="float32"))
    rounded = shutil.copytree(tiny, folder / "bfloat16")
    tensors = open_bf16(trained).tensors
    values = {name: tensors.read(name) for name in tensors}
    save_file(values, rounded / "model.safetensors", {"format": "pt"})
    return trained, rounded


def export(source, output, recipe, memory="whole"):
    overrides = [*FEW, f"model={source}", f"output={output}", f"quantize.memory={memory}"]
    return run(load_recipe(SHIPPED / "tiny" / f"{recipe}.yaml", overrides))


@pytest.mark.parametrize(("recipe", "memory"), [("fp8", "layers"), ("nvfp4", "whole")])
def test_the_export_is_that_of_the_rounded_checkpoint(sources, tmp_path, recipe, memory, caplog):
    trained, rounded = sources
    caplog.set_level("INFO")
    export(trained, tmp_path / "trained", recipe, memory)
    assert caplog.text.count("are not BF16 and are rounded to it (115 in F32)") == 1
    export(rounded, tmp_path / "rounded", recipe, memory)
    for file in sorted((tmp_path / "rounded").iterdir()):
        if file.name != "hybridquant.json":
            assert (tmp_path / "trained" / file.name).read_bytes() == file.read_bytes(), file.name
    assert verify(tmp_path / "trained", trained) == []
    assert verify(tmp_path / "trained", rounded) == []
    # One step of BF16 in one value is a fault.
    edit_tensors(tmp_path / "trained", lambda tensors: tensors[NORM].view(torch.int16)[5:6].add_(1))
    faults = [str(fault) for fault in verify(tmp_path / "trained", trained)]
    assert any(NORM in fault and "differs from the source" in fault for fault in faults)


def test_the_source_of_a_resumed_run_is_known_by_its_files(sources, tmp_path, monkeypatch):
    source = shutil.copytree(sources[0], tmp_path / "source")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.run.verify_and_measure", stop)
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "out", "fp8")
    monkeypatch.undo()
    # A change below BF16's precision: the rounded values are the same.
    tensors = load_file(source / "model.safetensors")
    tensors[LINEAR].view(-1)[0] *= 1 + 1e-7
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"source\.model\.safetensors: was"):
        export(source, tmp_path / "out", "fp8")
