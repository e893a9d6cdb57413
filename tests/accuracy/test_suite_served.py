"""A suite on real vLLM: the tiny checkpoint reads codes of its own task, in OCRBench's format, and
looks at clips in Video-MME's; a damaged export misses the gate.
"""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from ask_suite import plan_of
from editing import edit_tensors
from suite_data import write_clip, write_ocrbench_pictures, write_text_task, write_videomme

from accuracy.suites.catalogue import choose_tasks
from accuracy.suites.harness import DataSource
from accuracy.suites.run import open_suite
from accuracy.suites.serving import Model
from tiny.tasks import items

CODES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """OCRBench of pages with a code, and Video-MME of a clip."""
    folder = tmp_path_factory.mktemp("served")
    rows = []
    for sample in items("document", count=CODES):
        picture, question = sample.messages[-1]["content"]
        encoded = picture["image_url"]["url"].partition(",")[2]
        rows.append((encoded, question["text"], sample.answer))
    write_ocrbench_pictures(folder, rows)
    write_videomme(folder, ["A", "B"], write_clip(folder / "clip.mp4"))
    return folder


@pytest.mark.server
def test_scores_of_served_answers_are_those_worked_out_by_hand(folder, server, tiny):
    plan = plan_of(folder, ["ocrbench", "video_mme"], concurrency=8)
    model = Model(tiny, server.url)
    with open_suite(plan, tiny) as run:
        scores = run.scores(model, plan.video)
    kept = [json.loads(line) for file in folder.glob("out/answers/*") for line in file.open()]
    expected = {
        str(number): sample.answer for number, sample in enumerate(items("document", count=CODES))
    }
    by_hand = {}
    for line in kept:
        if line["task"] == "ocrbench":
            answer = expected[line["item"]]
            by_hand[line["item"]] = float(answer.lower() in line["answer"].lower())
    assert scores["ocrbench"].scores == by_hand
    assert sum(by_hand.values()) > CODES / 2  # the tiny checkpoint was trained to read them
    clips = [line for line in kept if line["task"] == "video_mme"]
    assert len(clips) == 2
    assert all(line["prompt_tokens"] > 100 and line["answer"] for line in clips)


@pytest.mark.server
def test_a_text_task_of_lm_eval_is_scored_as_by_hand(server, tiny, tmp_path):
    """The right answers are chosen after a first round: two numbers that were given, two not."""
    plan = plan_of(tmp_path, ["chartqa"])
    source = DataSource(tmp_path, tasks_folder=tmp_path / "tasks")
    plan = dataclasses.replace(plan, tasks=choose_tasks("text", ["small_sums"]), source=source)
    model = Model(tiny, server.url)
    right = ["0"] * 4
    for _ in range(2):
        write_text_task(tmp_path / "tasks", right)
        with open_suite(plan, tiny) as run:
            scores = run.scores(model, plan.video)["small_sums"].scores
        kept = [json.loads(line) for file in tmp_path.glob("out/answers/*") for line in file.open()]
        numbers = {line["item"]: re.findall(r"-?[0-9]+", line["answer"]) for line in kept}
        given = [numbers[f"small_sums/{number}"] for number in range(4)]
        by_hand = {}
        for number, found in enumerate(given):
            is_right = bool(found) and found[-1] == right[number]
            by_hand[f"small_sums/{number}"] = float(is_right)
        assert scores == by_hand
        right = [found[-1] if found and place < 2 else "-1" for place, found in enumerate(given)]
    assert sum(scores.values()) == 2
    assert all(line["prompt_tokens"] for line in kept)


def quiet_scales(tensors: dict[str, torch.Tensor]) -> None:
    """Weights that were written with scales of a fifth, as when a scale is inverted or lost."""
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name] = tensors[name] / 5


@pytest.mark.server
@pytest.mark.slow
def test_a_damaged_export_misses_the_gate(folder, server, tiny, fp8_copy):
    edit_tensors(fp8_copy, quiet_scales)
    plan = plan_of(folder, ["ocrbench"], concurrency=8)
    with open_suite(plan, tiny) as run:
        compared = run.compare(Model(tiny, server.url), [Model(fp8_copy)])
    row = compared[0].rows[0]
    assert row.variant_failed == 0
    assert row.found.reference > 0.5
    assert row.outcome == "failed"
    assert not compared[0].passed
