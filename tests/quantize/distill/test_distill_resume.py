"""A distillation that is killed at any moment is resumed by the same command and ends with the same
bytes.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from checkpoint.faults import BadInput
from checkpoint.files import TensorFiles
from checkpoint.opened import open_bf16, open_checkpoint
from checkpoint.run_state import RunState
from export.checks import trained_tensors, unchecked_parts
from export.load import load_exported
from export.manifest import read_manifest
from export.verify import verify
from pipeline.run import run
from quantize.distill.trainer import DistillationTrainer
from recipes.loading import SHIPPED, load_recipe
from tests.editing import edit_json, edit_tensors, raw_bytes
from tests.quantize.distill.distilling import one_thread  # noqa: F401

RECIPE = SHIPPED / "tiny/nvfp4_qad.yaml"
QUICK = (
    "accuracy.tasks=null",
    "quantize.layers=[{format: fp8}]",
    "calibrate.samples=2",
    "accuracy.samples=1",
    "distill.steps=4",
    "distill.batch=2",
    # Two or three of the samples below; the longest has some 40 tokens.
    "distill.pack_length=100",
    "distill.max_length=100",
    "distill.save_every=1",
    "distill.held_out=2",
    "distill.learning_rate=3.0e-5",
)


def overrides(tiny, output, *more):
    """Seven short samples, two of them held out, so that four steps of two go through the rest
    nearly twice. Of overrides with the same name, the last one counts.
    """
    samples = tiny.parent / "questions_to_distil.jsonl"
    if not samples.exists():
        lines = []
        for number in range(7):
            turn = {"role": "user", "content": f"Question {number}?"}
            lines.append(json.dumps({"messages": [turn], "answer": f"Answer {number}."}))
        samples.write_text("\n".join(lines))
    sections = ("calibrate", "accuracy", "distill")
    sources = [f"{section}.sources=[{{type: jsonl, path: {samples}}}]" for section in sections]
    given = [*QUICK, *sources, f"model={tiny}", f"output={output}", *more]
    return list({override.partition("=")[0]: override for override in given}.values())


def load_and_run(tiny, output, *more):
    return run(load_recipe(RECIPE, overrides(tiny, output, *more)))


def begin(tiny, output) -> subprocess.Popen:
    command = [sys.executable, "-m", "quantize.qad", str(RECIPE), *overrides(tiny, output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def kill_when(process: subprocess.Popen, path: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()


def assert_same_tensors(directory, other):
    ours = TensorFiles(directory)
    theirs = TensorFiles(other)
    assert ours.specs == theirs.specs
    for name in ours:
        assert torch.equal(raw_bytes(ours.read(name)), raw_bytes(theirs.read(name))), name


@pytest.fixture(scope="module")
def uninterrupted(one_thread, tiny, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("whole") / "out"
    assert load_and_run(tiny, output) in (0, 1)
    return output


def test_killed_between_and_in_mid_checkpoint_and_resumed_it_ends_with_the_same_bytes(
    tiny, uninterrupted, tmp_path
):
    output = tmp_path / "out"
    state = tmp_path / ".out.run"
    # While the weights of the second checkpoint are being written.
    kill_when(begin(tiny, output), state / "distill" / ".partial" / "checkpoint-2")
    assert not output.exists()
    with pytest.raises(BadInput) as caught:
        load_and_run(tiny, output, "distill.learning_rate=1.0e-5", "distill.steps=5")
    faults = {fault.where: fault.what for fault in caught.value.faults}
    assert set(faults) == {"distill.learning_rate", "distill.steps"}
    assert faults["distill.learning_rate"].startswith("was 3e-05 when")
    kill_when(begin(tiny, output), state / "distill" / "checkpoint-3")
    assert load_and_run(tiny, output) in (0, 1)
    assert_same_tensors(output, uninterrupted)
    ours = read_manifest(output).distillation
    assert ours == read_manifest(uninterrupted).distillation
    assert [step for step, _ in ours["losses"]] == [1, 2, 3, 4]
    assert not state.exists()


def interrupt(*_, **__):
    raise KeyboardInterrupt


def interrupt_behind_first_checkpoint(monkeypatch):
    record = RunState.record

    def interrupted(self, **finished):
        record(self, **finished)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunState, "record", interrupted)


def test_killed_while_exporting_it_does_not_train_again(tiny, uninterrupted, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.run.write_companions", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_and_run(tiny, output)
    monkeypatch.setattr(DistillationTrainer, "training_step", interrupt)
    load_and_run(tiny, output)
    assert_same_tensors(output, uninterrupted)
    assert read_manifest(output).distillation == read_manifest(uninterrupted).distillation


def test_killed_between_writing_and_the_verdict_it_comes_to_one_without_training_again(
    tiny, uninterrupted, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.run.measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_and_run(tiny, output)
    assert read_manifest(output).gate["passed"] is None
    monkeypatch.setattr(DistillationTrainer, "training_step", interrupt)
    with pytest.raises(BadInput, match=r"distill\.steps: was 4"):  # another recipe's output stays
        load_and_run(tiny, output, "distill.steps=5")
    load_and_run(tiny, output)
    resumed = read_manifest(output)
    same = {"recipe": resumed.recipe, "times": resumed.times}
    assert resumed == dataclasses.replace(read_manifest(uninterrupted), **same)
    assert_same_tensors(output, uninterrupted)
    assert not (tmp_path / ".out.run").exists()
    with pytest.raises(BadInput, match="exists already"):
        load_and_run(tiny, output)


@pytest.mark.parametrize("section", ["calibrate", "distill"])
def test_samples_that_have_changed_are_refused(tiny, tmp_path, monkeypatch, section):
    samples = tmp_path / "mine.jsonl"
    source = f"{section}.sources=[{{type: jsonl, path: {samples}}}]"
    given = overrides(tiny, tmp_path / "out", source)
    shutil.copyfile(tiny.parent / "questions_to_distil.jsonl", samples)
    with monkeypatch.context() as patch:
        interrupt_behind_first_checkpoint(patch)
        with pytest.raises(KeyboardInterrupt):
            run(load_recipe(RECIPE, given))
    samples.write_text(samples.read_text().replace("Answer 3", "Answer 5"))
    with pytest.raises(BadInput, match=r"samples\..*mine\.jsonl: was "):
        run(load_recipe(RECIPE, given))


@pytest.mark.parametrize("section", ["calibrate", "distill"])
def test_a_picture_that_has_changed_is_refused(tiny, tmp_path, monkeypatch, section):
    """The rows that name it are the same."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "Which colour?"}]
    row = {"messages": [{"role": "user", "content": content}], "answer": "Red."}
    (tmp_path / "mine.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row | {'answer': 'R'})}")
    source = f"{section}.sources=[{{type: jsonl, path: {tmp_path / 'mine.jsonl'}}}]"
    long = ["distill.max_length=800", "distill.pack_length=null", "distill.held_out=1"]
    given = overrides(tiny, tmp_path / "out", source, *long)
    with monkeypatch.context() as patch:
        interrupt_behind_first_checkpoint(patch)
        with pytest.raises(KeyboardInterrupt):
            run(load_recipe(RECIPE, given))
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "a.png")
    message = rf"media\.{tmp_path}: was 1 file, newest a\.png .* to start again"
    with pytest.raises(BadInput, match=message):
        run(load_recipe(RECIPE, given))


def test_a_source_that_has_changed_is_refused(tiny_copy, tmp_path, monkeypatch):
    state = tmp_path / ".out.run"
    with monkeypatch.context() as patch:
        interrupt_behind_first_checkpoint(patch)
        with pytest.raises(KeyboardInterrupt):
            load_and_run(tiny_copy, tmp_path / "out")
    edit_tensors(tiny_copy, lambda tensors: tensors["mlp1.1.weight"].add_(0.01))
    message = rf"source\.model\.safetensors: was .* remove {state} to start again"
    with pytest.raises(BadInput, match=message):
        load_and_run(tiny_copy, tmp_path / "out")


def test_a_run_interrupted_before_its_first_checkpoint_leaves_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(DistillationTrainer, "training_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_and_run(tiny, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def killed(one_thread, tiny, tmp_path_factory):  # noqa: F811
    """The state of a run that was killed behind its first checkpoint."""
    directory = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_behind_first_checkpoint(patch)
        with pytest.raises(KeyboardInterrupt):
            load_and_run(tiny, directory / "out")
    return directory / ".out.run"


@pytest.fixture
def state(killed, tmp_path):
    """A copy of it beside `tmp_path / "out"`."""
    return shutil.copytree(killed, tmp_path / ".out.run")


CHECKPOINT = "distill/checkpoint-1"


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "what"),
    [
        *((f"{CHECKPOINT}/{file}", Path.unlink, "is missing") for file in (
            "trained.safetensors",
            "optimizer.pt",  # transformers goes on without them
            "scheduler.pt",
            "rng_state.pth",
            "trainer_state.json",
        )),
        (f"{CHECKPOINT}/trained.safetensors", cut_short, "is not as it was written"),
        (f"{CHECKPOINT}/optimizer.pt", cut_short, "is not as it was written"),
        (f"{CHECKPOINT}/optimizer.pt", garble, "is not as it was written"),
        (f"{CHECKPOINT}/trainer_state.json", cut_short, "is not as it was written"),
        (f"{CHECKPOINT}/progress.json", cut_short, "cannot be read as JSON"),
        (f"{CHECKPOINT}/progress.json", Path.unlink, "no such file"),
        ("distill/best.safetensors", cut_short, "is missing or cut short"),
        ("distill/best.safetensors", Path.unlink, "is missing or cut short"),
        ("progress.json", cut_short, "cannot be read as JSON"),
        ("run.json", cut_short, "cannot be read as JSON"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused_before_the_weights_are_loaded(
    tiny, state, tmp_path, monkeypatch, name, damage, what
):
    monkeypatch.setattr("pipeline.whole.load_model", None)
    damage(state / name)
    with pytest.raises(BadInput) as caught:
        load_and_run(tiny, tmp_path / "out")
    (fault,) = caught.value.faults
    assert fault.where == str(state / name)
    assert what in fault.what
    assert fault.remedy == f"restore it to resume the run, or remove {state} to start again"


def test_what_may_have_stopped_a_run_may_be_changed_to_resume_it(
    tiny, uninterrupted, state, tmp_path
):
    """A sample that cannot be used, memory and patience stop a run after hours."""
    changed = ["distill.max_skipped=3", "distill.gradient_checkpointing=true"]
    changed += ["distill.patience=9", "calibrate.max_skipped=1", "accuracy.max_skipped=1"]
    assert load_and_run(tiny, tmp_path / "out", *changed) in (0, 1)
    assert_same_tensors(tmp_path / "out", uninterrupted)


def test_a_run_that_gains_nothing_exports_what_ptq_would(tiny, tmp_path):
    wild = ["distill.learning_rate=10", "distill.patience=9", "quantize.layers=[{format: nvfp4}]"]
    load_and_run(tiny, tmp_path / "distilled", *wild)
    course = read_manifest(tmp_path / "distilled").distillation
    assert course["best_step"] == 0
    assert course["trained"] == []
    assert len(course["held_out"]) == 5
    given = [text for text in overrides(tiny, tmp_path / "ptq") if "distill." not in text]
    given = [text for text in given if not text.startswith("quantize.layers")]
    run(load_recipe(RECIPE, [*given, "distill=null", "quantize.layers=[{format: nvfp4}]"]))
    assert_same_tensors(tmp_path / "distilled", tmp_path / "ptq")


@pytest.mark.parametrize("equal", [False, True])
def test_a_head_of_its_own_trains_apart_where_the_config_ties_it(tiny_copy, tmp_path, equal):
    """vLLM reads both tensors and ignores `tie_word_embeddings`, and so do loading and training."""
    head = "language_model.lm_head.weight"
    embeddings = "language_model.backbone.embeddings.weight"
    edit_json(tiny_copy / "config.json", tie_words)
    if equal:
        edit_tensors(tiny_copy, lambda tensors: tensors[head].copy_(tensors[embeddings]))
    output = tmp_path / "out"
    nvfp4 = ["quantize.layers=[{format: nvfp4}]", "distill.steps=2"]
    assert load_and_run(tiny_copy, output, *nvfp4) in (0, 1)
    source, written = TensorFiles(tiny_copy), TensorFiles(output)
    assert read_manifest(output).distillation["best_step"] > 0
    assert is_changed(source, written, head)
    assert is_changed(source, written, embeddings)
    assert not torch.equal(written.read(head), written.read(embeddings))
    assert verify(output, tiny_copy) == []
    loaded = load_exported(open_checkpoint(output)).language_model
    assert torch.equal(loaded.lm_head.weight, written.read(head))
    assert torch.equal(loaded.get_input_embeddings().weight, written.read(embeddings))


def tie_words(config):
    config["llm_config"]["tie_word_embeddings"] = True


def test_what_does_not_train_is_exported_as_it_was(tiny, tmp_path):
    output = tmp_path / "out"
    some = ["distill.train=down_proj", "distill.learning_rate=1e-3", "distill.steps=1"]
    assert load_and_run(tiny, output, *some) in (0, 1)
    trained = set(read_manifest(output).distillation["trained"])
    assert trained == {name for name in TensorFiles(tiny) if name.endswith("down_proj.weight")}
    plain = [text for text in overrides(tiny, tmp_path / "ptq") if "distill." not in text]
    run(load_recipe(RECIPE, [*plain, "distill=null"]))
    ptq, written = TensorFiles(tmp_path / "ptq"), TensorFiles(output)
    differing = set()
    for name in ptq:
        if not torch.equal(raw_bytes(ptq.read(name)), raw_bytes(written.read(name))):
            differing.add(name)
    assert trained <= differing
    assert {name.replace("_scale", "") for name in differing} == trained


def is_changed(source, written, name):
    """Whether a tensor that is not quantized differs from the source's."""
    if source.specs[name] != written.specs[name]:
        return False
    return not torch.equal(source.read(name), written.read(name))


def test_nvfp4_is_distilled_and_its_export_verified(tiny, tmp_path):
    nvfp4 = ["quantize.layers=[{format: nvfp4}]", "distill.steps=1", "distill.learning_rate=1e-5"]
    output = tmp_path / "out"
    assert load_and_run(tiny, output, *nvfp4) in (0, 1)
    manifest = read_manifest(output)
    assert verify(output, tiny) == []
    weights = [name for name in open_bf16(tiny).layout if name.startswith("language_model.")]
    assert manifest.distillation["trained"] == weights
    assert manifest.formats["nvfp4"] == 24
    source, written = TensorFiles(tiny), TensorFiles(output)
    changed = [name for name in weights if is_changed(source, written, name)]
    assert "language_model.lm_head.weight" in changed
    assert "language_model.backbone.embeddings.weight" in changed


def test_the_export_passes_verification_except_for_the_weights_that_it_names(
    uninterrupted, tiny, tiny_checkpoint, tmp_path
):
    assert verify(uninterrupted, tiny) == []
    manifest = read_manifest(uninterrupted)
    trained = manifest.distillation["trained"]
    assert trained_tensors(uninterrupted) == set(trained) != set()
    assert manifest.distillation["steps"] == 4
    copy = tmp_path / "copy"
    shutil.copytree(uninterrupted, copy)
    edit_tensors(copy, lambda tensors: tensors["mlp1.0.weight"].mul_(1.1))
    edit_json(copy / "hybridquant.json", lambda content: content.pop("files"))
    (fault,) = verify(copy, tiny)  # what was not trained is still compared
    assert "mlp1.0.weight" in str(fault)
    edit_json(copy / "hybridquant.json", lambda content: content["distillation"].update(trained=[]))
    assert any("further from the source" in str(fault) for fault in verify(copy, tiny))
    (part,) = unchecked_parts(uninterrupted, tiny_checkpoint, {"a": "b"})
    assert part == f"single weights of {len(trained)} tensors that a distillation has trained"


def test_a_recipe_chooses_the_loss_and_distils_by_default():
    assert load_recipe(RECIPE).distill.loss == "kl"
    assert load_recipe(RECIPE, ["distill.loss=cross_entropy"]).distill.loss == "cross_entropy"
    message = r"distill\.loss: is 'mse': should be 'kl' or 'cross_entropy'"
    with pytest.raises(BadInput, match=message):
        load_recipe(RECIPE, ["distill.loss=mse"])


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_would_refuse_is_refused_in_the_recipe(seed):
    with pytest.raises(BadInput, match=rf"distill\.seed: is {seed}: should be"):
        load_recipe(RECIPE, [f"distill.seed={seed}"])
    assert load_recipe(RECIPE, [f"distill.seed={2**32 - 1}"]).distill.seed == 2**32 - 1
