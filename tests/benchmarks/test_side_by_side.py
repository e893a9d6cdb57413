"""The side-by-side measurement runs whole on a CPU, so that a GPU's time is not spent on finding
its mistakes.
"""

import functools
import sys
import time

import pytest

from accuracy.paired import pair
from benchmarks import parts, processes, ptq, tiny_accuracy
from calibrate.sources.synthetic.kinds import draw
from checkpoint.faults import BadInput
from tiny.tasks import items


@pytest.mark.parametrize("streams", [True, False])
def test_whole_streamed_and_stock_are_measured_in_one_run(tiny, tmp_path, streams):
    result = ptq.measure(tiny, tmp_path, "fp8", samples=2, tokens=40, device="cpu", streams=streams)
    assert result["streamed_bytes_equal"] is (True if streams else None)
    assert result["faults"] == []
    assert set(result["times_faster_than_stock"]) == ({"ours", "streamed"} if streams else {"ours"})
    assert min(result["seconds"].values()) > 0
    assert result["written_gb"] > result["stock_written_gb"] > 0, (
        "stock writes the language model alone"
    )


def test_a_measurement_cut_off_goes_on_with_what_it_has(tiny, tmp_path, monkeypatch):
    asked = (tiny, tmp_path, "fp8", 1, 24, "cpu")

    def cut_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ptq, "_measure_stock", cut_off)
        with pytest.raises(KeyboardInterrupt):
            ptq.measure(*asked)
    monkeypatch.setattr(ptq, "_measure_ours", cut_off)
    monkeypatch.setattr(ptq, "_measure_streamed", cut_off)
    result = ptq.measure(*asked)
    assert {"raw forward 3", "streamed: verify", "stock: export"} <= set(result["seconds"])
    with pytest.raises(KeyboardInterrupt):
        ptq.measure(*asked)  # what is done is done: the next one measures everything again


def test_a_measurement_that_cannot_run_is_refused(monkeypatch, tmp_path):
    given = [
        "x",
        str(tmp_path),
        "--work",
        str(tmp_path),
        "--json",
        str(tmp_path / "j"),
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", [*given, "--format", "nvfp4"])
    with pytest.raises(BadInput, match="stock ModelOpt cannot quantize to nvfp4 on a CPU"):
        ptq._run()


def test_more_processes_than_gpus_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["x", "--work", str(tmp_path), "--json", "j", "--processes", "99"]
    )
    with pytest.raises(BadInput, match="CUDA devices are there"):
        processes._run()


def test_a_command_that_fails_says_what_it_said():
    with pytest.raises(RuntimeError, match=r"(?s)exit status 2.*nowhere"):
        processes.launched(("-m", "quantize.fp8", "nowhere.yaml"), "cpu")


def test_the_table_of_forms_cut_off_goes_on_with_the_answers_it_has(tmp_path, monkeypatch):
    asked = []

    def answer(config, samples, rate):
        asked.append((config.directory.name, rate))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {task: ["x"] * len(given) for task, given in samples.items()}

    monkeypatch.setattr(tiny_accuracy, "answer_tasks", answer)
    with pytest.raises(KeyboardInterrupt):
        tiny_accuracy.measure(tmp_path, ["fp8"], [], 1)
    result = tiny_accuracy.measure(tmp_path, ["fp8"], [], 1)
    assert asked == [
        ("bf16", 0.0),
        ("fp8", 0.0),
        ("bf16", 0.5),
        ("bf16", 0.5),
        ("bf16", 0.75),
        ("bf16", 0.9),
    ]
    assert result["against_bf16"]["fp8"][-1]["items"] == 6


def slowly(seconds):
    time.sleep(seconds)
    return {}


@pytest.mark.parametrize("jobs", [1, 2])
def test_forms_answer_one_after_another_or_at_once(jobs):
    todo = {name: functools.partial(dict, text=[name]) for name in ("bf16", "fp8", "nvfp4")}
    assert dict(parts.at_once(todo, jobs)) == {name: {"text": [name]} for name in todo}


def test_what_was_under_way_when_one_form_failed_is_kept():
    todo = {"bf16": functools.partial(slowly, 2), "nvfp4": functools.partial(slowly, -1)}
    kept = []

    def keep():
        for name, _ in parts.at_once(todo, 2):
            kept.append(name)

    with pytest.raises(ValueError, match="non-negative"):
        keep()
    assert kept == ["bf16"]


def asked_for(sample):
    """The question and the picture, where there is one."""
    return [part.get("text") or part["image_url"]["url"] for part in sample.messages[-1]["content"]]


def test_a_rate_is_chosen_on_items_that_are_no_test_items_and_that_no_recipe_draws(
    tmp_path, monkeypatch
):
    asked = []

    def answer(config, samples, rate):
        asked.append([asked_for(sample) for sample in samples["chart"]])
        return {"chart": ["x"] * len(samples["chart"])}

    monkeypatch.setattr(tiny_accuracy, "answer_tasks", answer)
    for split in ("test", "calibration"):
        tiny_accuracy.measure(tmp_path, [], [], 2, ["chart"], split=split)
    drawn = [
        asked_for(draw("chart", f"calibration-{seed}", n))
        for seed in (0, 1000003, 2000003)
        for n in (0, 1)
    ]
    assert not [item for item in asked[1] if item in asked[0] or item in drawn]


def test_what_distillation_wins_back_is_a_share_of_what_ptq_lost():
    asked = {"text": items("text", count=4)}
    right = [sample.answer for sample in asked["text"]]
    ptq, qad = (
        pair(asked, {"text": right}, {"text": [*right[:known], *[None] * (4 - known)]})
        for known in (1, 3)
    )
    assert tiny_accuracy.won_back(ptq, qad) == round(2 / 3, 3)
    assert tiny_accuracy.won_back(qad, ptq) == -2
    assert tiny_accuracy.won_back(pair(asked, {"text": right}, {"text": right}), qad) is None


@pytest.mark.parametrize("name", ["fp9", "fp8@3e-4", "nvfp4_qad@", "nvfp4_qad@fast", "nvfp4_qad@3"])
def test_a_form_that_cannot_be_made_is_refused(name):
    with pytest.raises(BadInput, match="--variants"):
        tiny_accuracy.check_variants(["nvfp4", name])


def test_a_rate_after_the_form_is_the_recipes(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(tiny_accuracy, "run", seen.append)
    tiny_accuracy.made("nvfp4_qat@3e-4", tmp_path, tmp_path / "bf16")
    assert (seen[0].distill.learning_rate, seen[0].distill.loss) == (3e-4, "cross_entropy")


def test_settings_are_for_the_recipe_that_distils(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(tiny_accuracy, "run", seen.append)
    for form in ("nvfp4", "nvfp4_qad"):
        tiny_accuracy.made(form, tmp_path, tmp_path / "bf16", ["distill.steps=7"])
    assert [recipe.distill and recipe.distill.steps for recipe in seen] == [None, 7]
