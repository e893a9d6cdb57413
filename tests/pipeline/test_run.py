"""The whole flow: what is left behind when it succeeds, when its gate is missed, and when the input
is bad.
"""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from accuracy.answers import answer_tasks
from calibrate.samples import Skipped
from checkpoint.faults import BadInput
from checkpoint.video import Video
from export.manifest import read_manifest
from export.verify import verify
from pipeline.inputs import prompts_of
from pipeline.run import run
from recipes.loading import SHIPPED, load_recipe
from tests.editing import edit_tensors
from tests.forked import run_forked

TINY = SHIPPED / "tiny" / "fp8.yaml"
ROOT = SHIPPED.parent
FEWER = {
    "whole": [("accuracy", "3"), ("calibrate", "1,024")],
    "layers": [("calibrate", "1,024"), ("accuracy", "3")],
}
"""Sections in the order in which each way reads them, and how many samples are asked for."""

QUICK = [
    "calibrate.samples=1",
    "accuracy.samples=1",
    "calibrate.sources=[{type: synthetic, kinds: {document: 1}}]",
]
QUICK += ["accuracy.sources=[{type: synthetic, kinds: {document: 1}}]", "accuracy.tasks=null"]


def quick(tiny, tmp_path, *overrides):
    """Load the quick recipe; of overrides with the same name, the last one counts."""
    given = [*QUICK, f"model={tiny}", f"output={tmp_path / 'out'}", *overrides]
    last = {override.partition("=")[0]: override for override in given}
    return load_recipe(TINY, list(last.values()))


def test_the_default_recipe_ends_verified_measured_and_passed(fp8_run, tiny):
    status, output = fp8_run
    assert status == 0
    assert verify(output, tiny) == []
    manifest = read_manifest(output)
    assert manifest.gate["passed"] is True
    assert manifest.gate["agreement"]["all"]["tokens"] > 0
    assert [row["task"] for row in manifest.gate["tasks"]] == ["document", "text", "mean"]
    assert manifest.gate["tasks"][-1]["reference"] > 0.9
    assert manifest.video == Video()
    assert manifest.calibration["samples"] == 7


def test_a_missed_gate_leaves_the_directory_marked_failed_and_exits_1(tiny, tmp_path):
    assert run(quick(tiny, tmp_path, "accuracy.max_kl=1.0e-9")) == 1
    manifest = read_manifest(tmp_path / "out")
    assert manifest.gate["passed"] is False
    assert "KL" in manifest.gate["missed"][0]
    assert verify(tmp_path / "out", tiny) == []


def test_tasks_below_bf16_miss_the_gate(tiny, tmp_path, monkeypatch):
    # What the result answers is spoilt, not the result: a gate that only looks at the files would
    # pass.
    answered = answer_tasks

    def spoilt(checkpoint, *given):
        answers = answered(checkpoint, *given)
        if checkpoint.directory != tmp_path / "out":
            return answers
        return {task: [None] * len(texts) for task, texts in answers.items()}

    monkeypatch.setattr("pipeline.measure.answer_tasks", spoilt)
    assert run(quick(tiny, tmp_path, "accuracy.tasks={names: [chart], items: 4, max_loss: 5}")) == 1
    (missed,) = read_manifest(tmp_path / "out").gate["missed"]
    assert missed == "task loss in points is 100, allowed is at most 5"


def test_part_of_the_model_and_an_fp8_kv_cache(tiny, tmp_path):
    rules = "quantize.layers=[{format: fp8}, {format: bf16, kind: mamba}]"
    run(quick(tiny, tmp_path, rules, "quantize.kv_cache=fp8"))
    assert verify(tmp_path / "out", tiny) == []
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["kv_cache_scheme"]["num_bits"] == 8


def jsonl(tmp_path, *lines) -> str:
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"calibrate.sources=[{{type: jsonl, path: {tmp_path / 'samples.jsonl'}}}]"


GOOD = {"messages": [{"role": "user", "content": "Read the code."}]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "contains no usable sample"),
        ([{"prompt": "x"}], "messages is None"),
        ([{"messages": []}], "non-empty list"),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "image", "image": "nowhere.png"}]}
                    ]
                }
            ],
            "nowhere.png",
        ),
        (
            [
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "video", "video": "broken.mp4"}]}
                    ]
                }
            ],
            "video cannot be read",
        ),
    ],
)
def test_bad_samples_end_the_run_with_nothing_written(tiny, tmp_path, lines, message):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(BadInput, match=message):
        run(quick(tiny, tmp_path, jsonl(tmp_path, *lines)))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("section", ["calibrate", "accuracy"])
def test_sources_without_a_usable_sample_are_named_by_their_section(
    tiny_checkpoint, tmp_path, section
):
    source = jsonl(tmp_path, GOOD).replace("calibrate", section)
    recipe = load_recipe(TINY, [source])
    with pytest.raises(BadInput, match=rf"{section}\.sources: no sample can be used"):
        prompts_of(
            getattr(recipe, section),
            section,
            tiny_checkpoint,
            Video(),
            Skipped(9),
            max_length=4,
        )


def test_a_bad_sample_among_good_ones_is_skipped_and_counted(tiny, tmp_path):
    source = jsonl(tmp_path, GOOD, {"messages": []}, GOOD)
    assert run(quick(tiny, tmp_path, source, "calibrate.samples=2", "calibrate.max_skipped=1")) in (
        0,
        1,
    )
    assert read_manifest(tmp_path / "out").calibration | {"samples": 2, "skipped": 1} == (
        read_manifest(tmp_path / "out").calibration
    )


@pytest.mark.parametrize("memory", ["whole", "layers"])
def test_fewer_samples_than_asked_for_are_one_warning_of_each_section(
    tiny, tmp_path, caplog, memory
):
    source = jsonl(tmp_path, GOOD, GOOD)
    held_out = source.replace("calibrate", "accuracy")
    more = ["calibrate.samples=1024", "accuracy.samples=3", f"quantize.memory={memory}"]
    with caplog.at_level("WARNING", logger="hybridquant"):
        run(quick(tiny, tmp_path, source, held_out, *more))
    assert [message for message in caplog.messages if "asks for" in message] == [
        f"{section}.sources: 2 samples, where {section}.samples asks for {asked}"
        for section, asked in FEWER[memory]
    ]


def test_bad_held_out_samples_are_skipped_up_to_accuracy_max_skipped(tiny, tmp_path):
    held_out = jsonl(tmp_path, GOOD, {"messages": []}, GOOD).replace("calibrate", "accuracy")
    with pytest.raises(BadInput, match="messages is"):
        run(quick(tiny, tmp_path, held_out, "accuracy.samples=2"))
    more = ["accuracy.samples=2", "accuracy.max_skipped=1"]
    assert run(quick(tiny, tmp_path, held_out, *more)) in (0, 1)
    assert read_manifest(tmp_path / "out").gate["agreement"]["all"]["tokens"] > 0


def test_too_many_bad_samples_in_mid_run_leave_nothing(tiny, tmp_path):
    source = jsonl(tmp_path, GOOD, {"messages": []}, GOOD)
    with pytest.raises(BadInput, match="messages is"):
        run(quick(tiny, tmp_path, source, "calibrate.samples=2"))
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_not_touched(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="exists already"):
        run(quick(tiny, tmp_path))
    assert os.listdir(tmp_path / "out") == []


def test_an_output_at_the_place_of_the_tiny_checkpoint_is_refused(tmp_path):
    with pytest.raises(BadInput, match="is where the tiny checkpoint itself is written"):
        run(quick("tiny", tmp_path, f"output={tmp_path / 'tiny-bf16'}"))
    assert os.listdir(tmp_path) == []


def test_a_source_whose_export_no_server_would_take_is_refused(tiny_copy, tmp_path):
    (tiny_copy / "generation_config.json").write_text('{"temperature": -1}')
    (tiny_copy / "configuration.py").unlink()
    with pytest.raises(BadInput, match="temperature is -1") as caught:
        run(quick(tiny_copy, tmp_path))
    assert "configuration.py: no such file, though config.json's auto_map" in str(caught.value)


def test_nan_weights_end_the_run_before_calibration(tiny_copy, tmp_path):
    edit_tensors(tiny_copy, lambda t: t["mlp1.1.weight"].fill_(float("nan")))
    with pytest.raises(BadInput, match=r"mlp1\.1\.weight: contains"):
        run(quick(tiny_copy, tmp_path))


def test_a_quantized_source_and_an_unknown_device_are_refused(fp8, tiny, tmp_path):
    with pytest.raises(BadInput, match="is quantized already"):
        run(quick(fp8, tmp_path))
    with pytest.raises(BadInput, match="device: 'cudaa'"):
        run(quick(tiny, tmp_path, "device=cudaa"))


def test_a_disk_that_fills_up_in_mid_run_ends_with_one_sentence_and_nothing_left(tiny, tmp_path):
    """The kernel refuses the write: a limit on file size stands for the full disk, which takes the
    same way.
    """

    def limit_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000,) * 2)

    arguments = [*QUICK, f"model={tiny}", f"output={tmp_path / 'out'}"]
    result = run_forked("quantize.fp8", *arguments, prepare=limit_files)
    assert result.returncode == 2, result.stderr
    assert "File too large (choose an output on a disk that takes files" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_command_ends_bad_input_with_exit_2_and_no_traceback(tmp_path):
    arguments = [f"model={tmp_path / 'nowhere'}", "output=/proc/x/y", "quantize.kv_cache=null"]
    result = run_forked("quantize.fp8", *arguments)
    assert result.returncode == 2
    assert "nowhere: no such directory (give the directory of a checkpoint)" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_names_the_recipe_the_overrides_and_every_field():
    command = [sys.executable, "-m", "quantize.fp8", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert "python -m quantize.fp8 [RECIPE] [key=value …]" in result.stdout
    assert "calibrate.samples=1024" in result.stdout
    assert "video.pruning_rate=0.75" in result.stdout


def test_killed_between_writing_and_the_verdict_the_same_command_measures(
    tiny, tmp_path, monkeypatch
):
    recipe = quick(tiny, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.run.verify_and_measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(recipe)
    assert read_manifest(tmp_path / "out").gate["passed"] is None
    weights = sorted((tmp_path / "out").glob("*.safetensors"))
    written = {file: file.stat().st_mtime_ns for file in weights}
    monkeypatch.setattr("pipeline.run.write_result", None)  # nothing is written again
    assert run(recipe) in (0, 1)
    assert read_manifest(tmp_path / "out").gate["passed"] in (True, False)
    assert written == {file: file.stat().st_mtime_ns for file in weights}
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(BadInput, match="exists already"):
        run(recipe)


def interrupt(*_):
    raise KeyboardInterrupt
