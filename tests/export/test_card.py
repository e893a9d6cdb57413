"""The model card: metadata by the Hub's own classes, the manifest's numbers, nothing made up."""

import argparse
import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from checkpoint.faults import BadInput, Fault
from export.publish.card import _run
from export.publish.facts import read_facts
from export.publish.model_card import Verdict, card_text, eval_results_text, find_origin
from export.publish.serving import VLLM, kernels, serve_commands
from export.publish.suites import read_accuracy
from export.verify import verify
from serve.command import build_command
from serve.environment import Device
from serve.settings import override, settings_for
from tests.editing import edit_json
from tests.export.suite_outcome import suite_outcome, write_outcome

ROOT = Path(__file__).parents[2]
MANIFEST = "hybridquant.json"
ORIGIN = ("--base-model", "acme/tiny-bf16", "--license", "apache-2.0")
SOUND = Verdict((), compared=False)
TASKS = [
    {"task": "document", "items": 300, "reference": 0.9, "variant": 0.89, "low": -0.02, "high": 0},
    {"task": "chart", "items": 300, "reference": 0.8, "variant": 0.81, "low": -0.01, "high": 0.03},
    {"task": "mean", "items": 600, "reference": 0.85, "variant": 0.85, "low": -0.01, "high": 0.01},
]


def given(**options) -> argparse.Namespace:
    names = ("base_model", "license", "license_name", "license_link")
    return argparse.Namespace(**{name: options.get(name) for name in names})


def manifest_of(directory: Path, **changed) -> None:
    edit_json(directory / MANIFEST, lambda raw: raw.update(changed))


def text_of(directory: Path, verdict: Verdict = SOUND, **options) -> str:
    facts = read_facts(directory)
    origin = find_origin(facts, given(base_model="acme/tiny-bf16", license="apache-2.0"))
    return card_text(facts, origin, verdict, "acme/tiny-fp8", **options)


@pytest.fixture
def measured(fp8_copy) -> Path:
    """The FP8 export with rows of three tasks in its manifest."""
    edit_json(fp8_copy / MANIFEST, lambda raw: raw["gate"].update(tasks=TASKS))
    return fp8_copy


def test_the_metadata_is_what_the_hub_reads(measured):
    data = ModelCard(text_of(measured)).data
    assert data.license == "apache-2.0"
    assert data.base_model == "acme/tiny-bf16"
    assert data.get("base_model_relation") == "quantized"
    assert data.library_name == "vllm"
    assert data.pipeline_tag == "image-text-to-text"
    assert {"hybridquant", "modelopt", "quantized", "fp8"} <= set(data.tags)
    assert data.model_name == "tiny-fp8"
    results = {result.dataset_name: result.metric_value for result in data.eval_results}
    assert results == {"document": 89.0, "chart": 81.0}


def test_the_accuracy_table_has_both_sides_and_the_interval(measured):
    text = text_of(measured)
    assert "| document | 300 | 90.0 % | 89.0 % | -1.0 | -2.0 … +0.0 |" in text
    assert "| mean | 600 | 85.0 % | 85.0 % | +0.0 | -1.0 … +1.0 |" in text
    assert "The accuracy gate of the recipe **passed**." in text


def test_eval_results_hold_the_same_numbers(measured):
    assert _run([str(measured), *ORIGIN]) == 0
    written = yaml.safe_load((measured / ".eval_results" / "hybridquant.yaml").read_text())
    entries = parse_eval_result_entries(written)
    assert {entry.task_id: entry.value for entry in entries} == {"document": 89.0, "chart": 81.0}
    assert entries[0].notes == (
        "300 items; BF16 90.0; difference -1.00, 95 % interval -2.00 to +0.00"
    )


def test_a_directory_with_a_card_still_verifies(measured, tiny):
    assert _run([str(measured), "--source", str(tiny), *ORIGIN]) == 0
    assert verify(measured, tiny) == []
    assert "every tensor was compared with its BF16 source" in (measured / "README.md").read_text()


def test_the_same_directory_gives_the_same_card(measured):
    _run([str(measured), *ORIGIN])
    first = (measured / "README.md").read_bytes()
    assert _run([str(measured)]) == 0  # base model and licence are in the card by now
    assert (measured / "README.md").read_bytes() == first


def test_rows_of_a_later_measurement_take_the_gates_place(fp8_copy, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{**TASKS[0], "task": "DocVQA", "dataset": "lmms-lab/DocVQA"}]))
    tasks, _ = read_accuracy([rows], fp8_copy)
    facts = read_facts(fp8_copy, tasks=tasks)
    assert [task.name for task in facts.tasks] == ["DocVQA"]
    assert "id: lmms-lab/DocVQA" in eval_results_text(facts)
    rows.write_text("{}")
    with pytest.raises(BadInput, match="has no rows of tasks"):
        read_accuracy([rows], fp8_copy)


def test_published_benchmarks_stand_in_the_card(measured, tiny, tmp_path):
    outcome = write_outcome(tmp_path / "report.json", measured, tiny)
    assert _run([str(measured), *ORIGIN, "--accuracy", str(outcome)]) == 1  # MathVista has lost
    text = unescaped((measured / "README.md").read_text())
    assert "Greedy, without reasoning, at most 1,024 new tokens." in text
    row = next(line for line in text.splitlines() if line.startswith("| chartqa |"))
    assert row.startswith("| chartqa | 997 | 90.0 % | 89.8 % | -0.2 |")
    assert row.endswith("| passed | BF16 89.68, FP8 PTQ 89.44, NVFP4 PTQ 88.84, NVFP4 QAD 89.96 |")
    assert "| mathvista | 997 |" in text
    assert "- mathvista: 5.0 points lost, 1.5 allowed." in text
    assert "- mathvista: scored by a rule, without a judge: not comparable" in text
    assert "- chartqa: 3 requests failed; they count neither right nor wrong." in text
    assert "- chartqa: BF16's server was asked twice; 12 of 1000 answers differ, 4" in text
    assert "- video_mme by EVS rate: 0: 66.1 %, 0.75: 65.2 %, 0.9: 63.0 %." in text
    assert "| document | 300 |" in text  # the exact tasks stay
    written = yaml.safe_load((measured / ".eval_results" / "hybridquant.yaml").read_text())
    entries = {entry.task_id: entry for entry in parse_eval_result_entries(written)}
    assert entries.keys() == {"document", "chart", *("chartqa", "mathvista", "video_mme")}
    assert entries["chartqa"].dataset_id == "VLMEvalKit/ChartQA_TEST"
    assert entries["chartqa"].value == 89.77


def test_an_outcome_of_other_files_is_refused(measured, tiny, tmp_path):
    outcome = write_outcome(tmp_path / "report.json", measured, tiny)
    (measured / "added.txt").write_text("changed")
    with pytest.raises(BadInput, match="was measured before the files of fp8 were changed"):
        read_accuracy([outcome], measured)
    with pytest.raises(BadInput, match="is of other checkpoints: fp8"):
        read_accuracy([outcome], tiny)


def test_what_a_recipes_gate_has_measured_is_shown_without_a_file(measured, tiny):
    outcome = suite_outcome(measured, tiny)
    edit_json(measured / MANIFEST, lambda raw: raw["gate"].update(suites=outcome))
    (found,) = read_facts(measured).benchmarks
    assert [row.task.name for row in found.missed] == ["mathvista"]
    assert "| chartqa | 997 |" in text_of(measured)


def test_a_failed_gate_and_faults_are_said_first(measured, capsys):
    missed = ["KL is 0.3, allowed is at most 0.1"]
    edit_json(measured / MANIFEST, lambda raw: raw["gate"].update(passed=False, missed=missed))
    verdict = Verdict((Fault("mlp1.1.weight", "contains NaN", "export again"),), compared=False)
    text = text_of(measured, verdict, notice="Uploaded although it is broken.")
    assert text.index("> Uploaded although it is broken.") < text.index("## What is quantized")
    assert "**failed**:\n\n- KL is 0.3, allowed is at most 0.1\n" in text
    assert "found **1 faults**, such as: mlp1.1.weight: contains NaN (export again)" in unescaped(
        text
    )
    assert _run([str(measured), *ORIGIN]) == 1


def unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def test_what_was_not_measured_is_not_claimed(fp8_copy):
    (fp8_copy / MANIFEST).unlink()
    text = text_of(fp8_copy)
    assert "was **not measured**" in text
    assert "benchmarks were not run" in text
    assert "## Calibration\nNot recorded." in text
    assert "model-index" not in text


def test_foreign_names_cannot_become_markup(measured):
    hostile = "<script>alert(1)</script> | [x](javascript:1) `"
    source = {"type": "hub", "name": hostile}
    edit_json(measured / MANIFEST, lambda raw: raw["gate"]["tasks"][0].update(task=hostile))
    edit_json(measured / MANIFEST, lambda raw: raw["recipe"]["calibrate"].update(sources=[source]))
    text = text_of(measured).partition("\n---\n")[2]
    assert "<script" not in text
    assert "[x](" not in text
    row = next(line for line in text.splitlines() if "alert" in line and line.startswith("|"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 7


def test_folders_of_the_machine_are_not_published(measured):
    source = {"type": "jsonl", "path": "/home/somebody/private/rows.jsonl"}
    edit_json(measured / MANIFEST, lambda raw: raw["recipe"]["calibrate"].update(sources=[source]))
    text = text_of(measured)
    assert "- jsonl rows.jsonl\n" in text
    assert str(measured) not in text
    assert "somebody" not in text


def test_base_model_and_licence_have_to_be_known(fp8_copy):
    with pytest.raises(BadInput) as caught:
        find_origin(read_facts(fp8_copy), given())
    assert [fault.remedy for fault in caught.value.faults] == [
        "give --base-model ORG/NAME",
        "give --license, such as apache-2.0",
    ]


@pytest.mark.parametrize(
    ("model", "base_model"),
    [
        (
            "/data/NVIDIA-Nemotron-Nano-12B-v2-VL-BF16/",
            "nvidia/NVIDIA-Nemotron-Nano-12B-v2-VL-BF16",
        ),
        ("/hub/models--acme--vl-bf16/snapshots/0123abc", "acme/vl-bf16"),
    ],
)
def test_the_base_model_follows_from_where_the_source_lay(fp8_copy, model, base_model):
    edit_json(fp8_copy / MANIFEST, lambda raw: raw["recipe"].update(model=model))
    assert find_origin(read_facts(fp8_copy), given(license="mit")).base_model == base_model


def test_the_licence_is_that_of_the_sources_readme(fp8_copy):
    (fp8_copy / "README.md").write_text(
        "---\nlicense: other\nlicense_name: open-model-license\nlicense_link: https://example.com\n"
        "base_model: acme/what-the-source-was-made-from\n---\n# Source\n"
    )
    origin = find_origin(read_facts(fp8_copy), given(base_model="acme/source"))
    assert (origin.license, origin.license_name) == ("other", "open-model-license")
    assert origin.license_link == "https://example.com"
    assert origin.base_model == "acme/source"


def test_a_licence_file_is_linked(fp8_copy):
    (fp8_copy / "LICENSE").write_text("terms")
    origin = find_origin(read_facts(fp8_copy), given(base_model="acme/source"))
    assert (origin.license, origin.license_link) == ("other", "LICENSE")


def test_the_commands_are_those_that_hybridquant_serve_runs(fp8):
    commands = serve_commands(read_facts(fp8), "acme/tiny-fp8")
    settings = settings_for(fp8)
    device = Device("cuda", "GPU", (9, 0), 1)
    for shown, rate in ((commands.vllm, 0.75), (commands.vllm_without_evs, 0.0)):
        changed = override(settings, {"video.pruning_rate": rate})
        run = build_command(fp8, changed, VLLM, device)
        words = shlex.split(shown.replace("\\\n", " "))
        assert words[:3] == ["vllm", "serve", "acme/tiny-fp8"]
        first_kept = run.index("--dtype")
        kept = " ".join(run[first_kept:])
        kept = re.sub(r" --allowed-media-domains \S+", "", kept)  # what a server may fetch
        assert " ".join(words[3:]) == kept
    assert commands.ours == "hybridquant serve tiny-fp8"


def test_the_commands_are_for_the_vllm_that_is_pinned_for_gpus():
    pinned = (ROOT / "requirements-serve-cuda.txt").read_text(encoding="utf-8")
    assert f"vllm=={'.'.join(map(str, VLLM))}" in pinned.splitlines() or (
        f"vllm=={'.'.join(map(str, VLLM))} " in (ROOT / "Makefile").read_text(encoding="utf-8")
    )


def test_what_gpus_compute(fp8):
    facts = read_facts(fp8)
    rows = dict(kernels(facts))
    assert rows["Hopper, 9.0"] == "FP8 arithmetic, weights and activations"
    assert rows["Ampere, 8.0"] == "quantized weights, BF16 arithmetic (vLLM 0.32 and newer)"
    weight_only = dataclasses.replace(facts, formats={"W4A16_NVFP4": 24})
    assert {what for _, what in kernels(weight_only)} == {"quantized weights, BF16 arithmetic"}
    mixed = dataclasses.replace(facts, formats={"NVFP4": 12, "BF16": 8, "FP8": 4})
    rows = dict(kernels(mixed))
    assert rows["Hopper, 9.0"] == (
        "NVFP4: quantized weights, BF16 arithmetic; FP8: FP8 arithmetic, weights and activations"
    )
