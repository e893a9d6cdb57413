"""A distillation killed at any moment goes on with the same command and ends with the same bytes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoint.faults import BadInput
from export.manifest import read_manifest
from export.verify import show_faults, trained_linears, verify
from pipeline.run import run
from recipes.schema import load_recipe
from tests.editing import edit_json, edit_tensors
from tests.quantize.distill.distilling import one_thread  # noqa: F401

RECIPE = Path("recipes/tiny/nvfp4_qad.yaml")
QUICK = [
    "accuracy.tasks=null",
    "quantize.layers=[{format: fp8}]",
    "calibrate.samples=2",
    "accuracy.samples=1",
    "distill.steps=4",
]
QUICK += [
    "distill.batch=2",
    "distill.save_every=1",
    "distill.held_out=2",
    "distill.learning_rate=3.0e-5",
]


def overrides(tiny, output, *more):
    """Seven short samples, two of them held out, so that four steps of two go through the rest
    nearly twice.
    """
    samples = tiny.parent / "samples.jsonl"
    if not samples.exists():
        turns = [{"role": "user", "content": f"Question {n}?"} for n in range(7)]
        lines = [
            json.dumps({"messages": [turn], "answer": f"Answer {n}."})
            for n, turn in enumerate(turns)
        ]
        samples.write_text("\n".join(lines))
    sections = ("calibrate", "accuracy", "distill")
    sources = [f"{section}.sources=[{{type: jsonl, path: {samples}}}]" for section in sections]
    return [*QUICK, *sources, f"model={tiny}", f"output={output}", *more]


def begin(tiny, output) -> subprocess.Popen:
    command = [sys.executable, "-m", "quantize.qad", str(RECIPE), *overrides(tiny, output)]
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )


def kill_when(process: subprocess.Popen, path: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()


@pytest.fixture(scope="module")
def uninterrupted(one_thread, tiny, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("whole") / "out"
    assert run(load_recipe(RECIPE, overrides(tiny, output))) in (0, 1)
    return output


def test_killed_between_and_in_mid_checkpoint_and_taken_up_again_it_ends_with_the_same_bytes(
    tiny, uninterrupted, tmp_path
):
    output, state = tmp_path / "out", tmp_path / ".out.qad"
    kill_when(
        begin(tiny, output), state / ".partial" / "checkpoint-2"
    )  # its weights are being written
    assert not output.exists()
    with pytest.raises(BadInput) as caught:
        load_and_run(tiny, output, "distill.learning_rate=1.0e-5", "distill.steps=5")
    faults = {fault.where: fault.what for fault in caught.value.faults}
    assert set(faults) == {"distill.learning_rate", "distill.steps"}
    assert faults["distill.learning_rate"].startswith("was 3e-05 when")
    kill_when(begin(tiny, output), state / "checkpoint-3")
    assert load_and_run(tiny, output) in (0, 1)
    assert (output / "model.safetensors").read_bytes() == (
        uninterrupted / "model.safetensors"
    ).read_bytes()
    ours, theirs = (read_manifest(directory).distillation for directory in (output, uninterrupted))
    assert ours == theirs
    assert [step for step, _ in ours["losses"]] == [1, 2, 3, 4]
    assert not state.exists()


def load_and_run(tiny, output, *more):
    return run(load_recipe(RECIPE, overrides(tiny, output, *more)))


def interrupt(*_):
    raise KeyboardInterrupt


def test_killed_while_exporting_it_does_not_train_again(tiny, uninterrupted, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.run.write_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_and_run(tiny, output)
    monkeypatch.setattr("quantize.distill.trainer.DistillationTrainer.training_step", None)
    load_and_run(tiny, output)
    assert (output / "model.safetensors").read_bytes() == (
        uninterrupted / "model.safetensors"
    ).read_bytes()
    assert read_manifest(output).distillation == read_manifest(uninterrupted).distillation


def test_killed_between_writing_and_the_verdict_it_comes_to_one_without_training_again(
    tiny, uninterrupted, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.run.conclude", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_and_run(tiny, output)
    assert read_manifest(output).gate["passed"] is None
    monkeypatch.setattr("quantize.distill.trainer.DistillationTrainer.training_step", None)
    with pytest.raises(BadInput, match="exists already"):  # another recipe's output stays
        load_and_run(tiny, output, "serve.video_pruning_rate=0.5")
    load_and_run(tiny, output)
    assert read_manifest(output) == dataclasses.replace(
        read_manifest(uninterrupted), recipe=read_manifest(output).recipe
    )
    assert (output / "model.safetensors").read_bytes() == (
        uninterrupted / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / ".out.qad").exists()
    with pytest.raises(BadInput, match="exists already"):
        load_and_run(tiny, output)


@pytest.mark.parametrize("section", ["calibrate", "distill"])
def test_samples_that_have_changed_are_refused(tiny, tmp_path, monkeypatch, section):
    given, samples = overrides(tiny, tmp_path / "out"), tmp_path / "mine.jsonl"
    samples.write_bytes((tiny.parent / "samples.jsonl").read_bytes())
    given.append(f"{section}.sources=[{{type: jsonl, path: {samples}}}]")
    monkeypatch.setattr("quantize.distill.distillation.DistillationTrainer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(load_recipe(RECIPE, given))
    samples.write_text(samples.read_text().replace("Answer 3", "Answer 5"))
    with pytest.raises(BadInput, match=r"samples\..*mine\.jsonl: was "):
        run(load_recipe(RECIPE, given))


def test_nvfp4_is_distilled_and_its_export_verified(tiny, tmp_path):
    nvfp4 = ["quantize.layers=[{format: nvfp4}]", "distill.steps=1", "distill.learning_rate=1e-5"]
    output = tmp_path / "out"
    assert load_and_run(tiny, output, *nvfp4) in (0, 1)
    manifest = read_manifest(output)
    assert verify(output, tiny) == []
    assert len(manifest.distillation["trained"]) == manifest.formats["nvfp4"] == 24


def test_a_source_that_has_changed_is_refused(tiny_copy, tmp_path, monkeypatch):
    state = tmp_path / ".out.qad"
    monkeypatch.setattr("quantize.distill.distillation.DistillationTrainer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_and_run(tiny_copy, tmp_path / "out")
    edit_tensors(tiny_copy, lambda tensors: tensors["mlp1.1.weight"].add_(0.01))
    with pytest.raises(
        BadInput, match=rf"source\.model\.safetensors: was .* remove {state} to start anew"
    ):
        load_and_run(tiny_copy, tmp_path / "out")


def test_the_export_passes_verification_but_for_nothing_it_says(
    uninterrupted, tiny, tmp_path, capsys
):
    assert verify(uninterrupted, tiny) == []
    trained = read_manifest(uninterrupted).distillation["trained"]
    assert trained_linears(uninterrupted) == set(trained) != set()
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", uninterrupted, copy], check=True)
    edit_tensors(copy, lambda tensors: tensors["language_model.backbone.norm_f.weight"].mul_(1.1))
    assert ["norm_f" in str(fault) for fault in verify(copy, tiny)] == [
        True
    ]  # what was not trained is still compared
    edit_json(
        copy / "hybridquant.json", lambda manifest: manifest["distillation"].update(trained=[])
    )
    assert any("further from the source" in str(fault) for fault in verify(copy, tiny))
    show_faults(uninterrupted, [])
    assert f"{len(trained)} linears were trained" in capsys.readouterr().out
    assert (
        json.loads((uninterrupted / "hybridquant.json").read_text())["distillation"]["steps"] == 4
    )
