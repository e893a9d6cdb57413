"""The table of the tiny checkpoint's forms: what is asked, what is compared, what is resumed."""

import pytest

from accuracy.paired import pair
from benchmarks import tiny_table
from benchmarks.tiny_forms import check_variants
from calibrate.sources.synthetic.kinds import draw
from checkpoint.faults import BadInput
from tiny.tasks import items


def wrong_answers(samples):
    return {task: ["x"] * len(asked) for task, asked in samples.items()}


def test_a_table_that_was_stopped_is_resumed_with_the_answers_it_has(tmp_path, monkeypatch):
    asked = []

    def answer(checkpoint, samples, video):
        asked.append((checkpoint.directory.name, video.pruning_rate))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return wrong_answers(samples)

    monkeypatch.setattr(tiny_table, "answer_tasks", answer)
    with pytest.raises(KeyboardInterrupt):
        tiny_table.measure(tmp_path, ["fp8"], [], 1)
    result = tiny_table.measure(tmp_path, ["fp8"], [], 1)
    assert asked == [
        ("bf16", 0.0),
        ("fp8", 0.0),
        ("bf16", 0.5),
        ("bf16", 0.5),
        ("bf16", 0.75),
        ("bf16", 0.9),
    ]
    assert result["against_bf16"]["fp8"][-1]["items"] == 6


def content(sample):
    """The question, and the picture where there is one."""
    parts = sample.messages[-1]["content"]
    return [part.get("text") or part["image_url"]["url"] for part in parts]


def test_calibration_items_are_neither_test_items_nor_those_that_a_recipe_draws(
    tmp_path, monkeypatch
):
    asked = []

    def answer(checkpoint, samples, video):
        asked.append([content(sample) for sample in samples["chart"]])
        return wrong_answers(samples)

    monkeypatch.setattr(tiny_table, "answer_tasks", answer)
    for split in ("test", "calibration"):
        tiny_table.measure(tmp_path, [], [], 2, ["chart"], split=split)
    test_items, calibration_items = asked
    drawn = []
    for seed in (0, 1000003, 2000003):
        for index in (0, 1):
            drawn.append(content(draw("chart", f"calibration-{seed}", index)))
    for item in calibration_items:
        assert item not in test_items
        assert item not in drawn


def test_served_forms_are_compared_with_served_bf16_and_with_ptq_of_the_same_backend(
    tmp_path, monkeypatch
):
    right = {"bf16": 4, "nvfp4": 2, "nvfp4:emulation": 1, "nvfp4_qad:emulation": 3}

    def served(name, questions, flags, share):
        answers = {}
        for task, samples in questions.samples.items():
            known = [sample.answer for sample in samples[: right[name]]]
            answers[task] = known + ["x"] * (len(samples) - right[name])
        return {"answers": answers, "kernels": [name], "weights_gib": None}

    monkeypatch.setattr(tiny_table, "made", lambda form, work, model, settings: model)
    monkeypatch.setattr(tiny_table, "distillation", lambda directory: {})
    monkeypatch.setattr(
        tiny_table, "answer_tasks", lambda checkpoint, samples, video: wrong_answers(samples)
    )
    monkeypatch.setattr(tiny_table, "served_answers", served)
    monkeypatch.setattr(tiny_table, "vllm_version", lambda: "0.32.0")
    found = tiny_table.measure(tmp_path, ["nvfp4", "nvfp4_qad"], list(right), 4, ["text"])
    against = {}
    for name, rows in found["served_against_bf16"].items():
        against[name] = (rows[0]["reference"], rows[0]["variant"])
    assert against == {
        "nvfp4": (1, 0.5),
        "nvfp4:emulation": (1, 0.25),
        "nvfp4_qad:emulation": (1, 0.75),
    }
    assert found["won_back_served"] == {"nvfp4_qad:emulation": round(2 / 3, 3)}
    assert found["kernels"]["nvfp4"] == ["nvfp4"]


def test_what_distillation_wins_back_is_a_share_of_what_ptq_lost():
    asked = {"text": items("text", count=4)}
    right = [sample.answer for sample in asked["text"]]

    def compared(known):
        answers = right[:known] + [None] * (4 - known)
        return pair(asked, {"text": right}, {"text": answers})

    ptq = compared(1)
    qad = compared(3)
    assert tiny_table.won_back(ptq, qad) == round(2 / 3, 3)
    assert tiny_table.won_back(qad, ptq) == -2
    assert tiny_table.won_back(compared(4), qad) is None


@pytest.mark.parametrize("name", ["fp9", "fp8@3e-4", "nvfp4_qad@", "nvfp4_qad@fast", "nvfp4_qad@3"])
def test_a_form_that_cannot_be_made_is_refused(name):
    with pytest.raises(BadInput, match="--variants"):
        check_variants(["nvfp4", name])


@pytest.fixture
def recipes(monkeypatch):
    """The recipes that would have been run."""
    seen = []
    monkeypatch.setattr(tiny_table, "run", seen.append)
    return seen


def test_a_rate_after_the_form_is_the_learning_rate_of_the_recipe(tmp_path, recipes):
    tiny_table.made("nvfp4_qat@3e-4", tmp_path, tmp_path / "bf16")
    distill = recipes[0].distill
    assert distill.learning_rate == 3e-4
    assert distill.loss == "cross_entropy"


def test_settings_are_for_the_recipe_that_distils(tmp_path, recipes):
    for form in ("nvfp4", "nvfp4_qad"):
        tiny_table.made(form, tmp_path, tmp_path / "bf16", ["distill.steps=7"])
    ptq, qad = recipes
    assert ptq.distill is None
    assert qad.distill.steps == 7
