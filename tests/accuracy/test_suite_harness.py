"""The workers with the real VLMEvalKit and the real lm-eval: prompts and scores of small data in
the benchmarks' own formats, scores worked out by hand.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import suite_data
from json_server import JsonHandler, serving

import accuracy.suites
from accuracy.suites.catalogue import REPORT, Task, choose_tasks
from accuracy.suites.harness import DataSource, HarnessTask, Judge, find_python
from checkpoint.faults import BadInput

WORKERS = Path(accuracy.suites.__file__).parent / "workers"

# By data set: answers by item, scores by hand, the figure in percent.
SCORED = {
    # A number counts within 5 %, other answers when they are equal.
    "ChartQA_TEST": (
        {"0": "100", "1": "41.5", "2": "blue", "3": "2011"},
        {"0": 1, "1": 1, "2": 0, "3": 1},
        75,
    ),
    # ANLS: one minus the edit distance over the longer length; below one half it is nothing.
    "DocVQA_VAL": (
        {"0": "Anna Smith", "1": "Berne", "2": "", "3": "june"},
        {"0": 1, "1": 1, "2": 0, "3": 0.5},
        62.5,
    ),
    # The mean over ten people of a third for each other one who wrote the answer, at most one: two
    # wrote "exit", who find one other each, and eight find two: (2 · 1/3 + 8 · 2/3) / 10.
    "TextVQA_VAL": ({"0": "Stop", "1": "exit"}, {"0": 1, "1": 0.6}, 80),
    "MMMU_DEV_VAL": (
        {"1": "A", "2": "The answer is C", "3": "C. triangle"},
        {"1": 1, "2": 0, "3": 1},
        200 / 3,
    ),
    "OCRBench": (
        {"0": "It says hello.", "1": "", "2": "007", "3": "Sale!"},
        {"0": 1, "1": 0, "2": 0, "3": 1},
        50,
    ),
    # The mean of a half (text recognition) and one (understanding), not of three items.
    "OCRBench_v2": ({"0": "north", "1": "south", "2": "seven"}, {"0": 1, "1": 0, "2": 1}, 75),
    "MathVista_MINI": ({"0": "5", "1": "7"}, {"0": 1, "1": 0}, 50),
    # ANLS as for DocVQA: one of nine characters is another one; capitals do not count.
    "InfoVQA_VAL": (
        {"0": "1,200", "1": "NORTH", "2": "July 2018"},
        {"0": 1, "1": 1, "2": 8 / 9},
        100 * (1 + 1 + 8 / 9) / 3,
    ),
    # A letter, a sentence with a letter, the text of a choice, no choice.
    "AI2D_TEST": (
        {"0": "A", "1": "The answer is B.", "2": "leaf", "3": "I cannot see it"},
        {"0": 1, "1": 1, "2": 1, "3": 0},
        75,
    ),
    # By rule: a number counts as a number, text without its spaces, a choice by its letter.
    "OCR_Reasoning": (
        {"0": "12", "1": "2.50", "2": "7 : 30", "3": "B", "4": "0"},
        {"0": 1, "1": 1, "2": 1, "3": 0, "4": 1},
        80,
    ),
    # Two of four items, not the first ones.
    "Video-MME": ({"1": "B", "3": "I do not know"}, {"1": 1, "3": 0}, 50),
    "LongVideoBench": ({"1": "B", "3": "A"}, {"1": 1, "3": 0}, 50),
}


def talk(worker: str, requests: list[dict]) -> list[dict]:
    """The replies of a worker to requests."""
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    command = [str(find_python()), "-E", str(WORKERS / worker)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, input=lines, capture_output=True, text=True, timeout=300, env=offline
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    suite_data.write_all(folder)
    return folder


@pytest.fixture(scope="module")
def replies(data) -> dict[str, list[dict]]:
    """Replies to opening, to an item's prompt and to scoring, by data set; from one worker."""
    requests = []
    for name, (answers, _, _) in SCORED.items():
        requests += [
            {"do": "open", "dataset": name, "data": str(data), "is_own_data": True},
            {"do": "prompt", "item": "1"},
            {"do": "score", "answers": answers, "judge": None},
        ]
    found = iter(talk("vlm_worker.py", requests))
    return {name: [next(found), next(found), next(found)] for name in SCORED}


@pytest.mark.parametrize("name", SCORED)
def test_scores_are_those_worked_out_by_hand(replies, name):
    scored = replies[name][2]["result"]
    _, scores, overall = SCORED[name]
    assert scored["scores"] == pytest.approx(scores)
    assert scored["overall"] == pytest.approx(overall, abs=0.05)


UNPACKING = """
import json, sys
sys.path.insert(0, sys.argv[1])
import vlm_worker
vlm_worker._prepare_harness()
from vlmeval.dataset import image_base
image_base.file_size = lambda path, unit: 2  # gigabytes
suite = vlm_worker.Suite()
suite.open({"dataset": "ChartQA_TEST", "data": sys.argv[2], "is_own_data": True})
print(json.dumps(suite.prompt({"item": "1"})))
"""


def test_a_table_above_one_gigabyte_is_unpacked_without_vlmevals_tools(tmp_path):
    """VLMEvalKit unpacks it with vlmeval.tools, which cannot be imported without torch."""
    suite_data.write_chartqa(tmp_path, ["1", "2"])
    command = [str(find_python()), "-E", "-c", UNPACKING, str(WORKERS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    prompt = json.loads(done.stdout.splitlines()[-1])
    assert Path(prompt["messages"][0]["content"][0]["path"]).is_file()
    assert (tmp_path / "ChartQA_TEST_local.tsv").exists()


def test_only_what_the_published_figure_counts_is_asked(replies):
    validation = [item["id"] for item in replies["MMMU_DEV_VAL"][0]["result"]["items"]]
    english = [item["id"] for item in replies["OCRBench_v2"][0]["result"]["items"]]
    assert validation == ["1", "2", "3"]
    assert english == ["0", "1", "2"]


def content(replies, name) -> list[dict]:
    return replies[name][1]["result"]["messages"][0]["content"]


def test_prompts_are_vlmevalkits(replies):
    picture, text = content(replies, "ChartQA_TEST")
    assert Path(picture["path"]).read_bytes().startswith(b"\x89PNG")
    assert text["text"] == "What is bar 1?\nAnswer the question using a single word or phrase."


def test_a_picture_stands_where_the_question_names_it(replies):
    kinds = [part["type"] for part in content(replies, "MMMU_DEV_VAL")]
    assert kinds == ["text", "image", "text"]


@pytest.mark.parametrize("name", ["Video-MME", "LongVideoBench"])
def test_a_clip_is_sent_as_a_clip(replies, name):
    parts = content(replies, name)
    assert parts[0]["type"] == "video"
    assert Path(parts[0]["path"]).suffix == ".mp4"
    assert all(part["type"] == "text" and part["text"] for part in parts[1:])
    assert Path(parts[0]["path"]).is_relative_to(replies[name][0]["result"]["media_root"])


def test_lm_evals_prompts_and_scores(data):
    answers = {"small_sums/0": "#### 1", "small_sums/1": "2 is the answer", "small_sums/2": "four"}
    opened, prompt, scored = talk(
        "text_worker.py",
        [
            {
                "do": "open",
                "dataset": "small_sums",
                "limit": 3,
                "tasks_folder": str(data / "tasks"),
            },
            {"do": "prompt", "item": "small_sums/1"},
            {"do": "score", "answers": answers, "judge": None},
        ],
    )
    assert [item["id"] for item in opened["result"]["items"]] == list(answers)
    assert prompt["result"] == {
        "messages": [{"role": "user", "content": "Question: What is 1 plus one?\nAnswer:"}],
        "stop": ["Question:"],
        "max_tokens": 16,
    }
    # The second reading of an answer, flexible-extract, finds the number without ####.
    assert scored["result"]["scores"] == {
        "small_sums/0": 1,
        "small_sums/1": 1,
        "small_sums/2": 0,
    }


@pytest.fixture
def judge():
    """A judge with the OpenAI protocol that says `reply(prompt)`, 7; `.asked` are its prompts."""

    class Handler(JsonHandler):
        def do_POST(self):
            prompt = str(self.request_body()["messages"][-1]["content"])
            self.server.asked.append(prompt)
            self.send(200, {"choices": [{"message": {"content": self.server.reply(prompt)}}]})

    with serving(Handler, asked=[], reply=lambda prompt: "7") as server:
        yield server


def test_a_judge_reads_what_the_rule_cannot(tmp_path, judge):
    """Of answers in words the rule reads none; the judge reads 7, which is right for the first."""
    suite_data.write_mathvista(tmp_path, [7, 8])
    answers = {"0": "There are seven dots.", "1": "I count seven."}
    task = Task("mathvista", "MathVista_MINI", needs_judge=True)
    reader = Judge(f"http://127.0.0.1:{judge.server_port}", "org/judge", "secret-key")
    with HarnessTask(task, DataSource(tmp_path, True), tmp_path / "log") as opened:
        assert opened.score(answers).scores == {"0": 0, "1": 0}
        judged = opened.score(answers, reader)
    assert judged.scores == {"0": 1, "1": 0}
    assert judged.overall == pytest.approx(50)
    assert any("There are seven dots." in str(prompt) for prompt in judge.asked)
    assert "secret-key" not in (tmp_path / "log").read_text()


def test_a_judge_of_ocr_reasoning_rates_and_reads(tmp_path, judge):
    """The judge rates the reasoning of every answer, which is not counted, and reads the number."""
    suite_data.write_ocr_reasoning(tmp_path, [("integer", "7"), ("integer", "8")])
    judge.reply = lambda prompt: "Rating: [[9]]" if "impartial judge" in prompt else "7"
    task = Task("ocr_reasoning", "OCR_Reasoning", needs_judge=True)
    reader = Judge(judge.url, "judge", "none")
    with HarnessTask(task, DataSource(tmp_path, True), tmp_path / "log") as opened:
        judged = opened.score({"0": "It makes seven.", "1": "It makes seven."}, reader)
    assert judged.scores == {"0": 1, "1": 0}
    assert judged.overall == pytest.approx(50)


def test_answers_that_a_judge_does_not_rate_are_unscored(tmp_path, judge):
    """VLMEvalKit would end with an AttributeError, after everything was asked."""
    suite_data.write_ocr_reasoning(tmp_path, [("integer", "7"), ("integer", "8")])
    judge.reply = lambda prompt: "[[9]]" if "makes seven" in prompt else "I would rather not."
    task = Task("ocr_reasoning", "OCR_Reasoning", needs_judge=True)
    with HarnessTask(task, DataSource(tmp_path, True), tmp_path / "log") as opened:
        judged = opened.score({"0": "It makes seven.", "1": "8"}, Judge(judge.url, "judge", "none"))
    assert judged.unscored == ("1",)
    assert judged.scores.keys() == {"0"}


def test_data_that_is_not_the_published_is_refused_unless_it_is_said_to_be_ones_own(data, tmp_path):
    with pytest.raises(BadInput) as caught:
        HarnessTask(Task("chartqa", "ChartQA_TEST"), DataSource(data), tmp_path / "log")
    assert "is not the published file" in str(caught.value)
    assert "--own-data" in str(caught.value)


def test_a_sample_is_always_the_same_and_holds_a_smaller_one(data, tmp_path):
    task = Task("chartqa", "ChartQA_TEST")
    samples = []
    for limit in (2, 3):
        with HarnessTask(task, DataSource(data, True, None, limit), tmp_path / "log") as opened:
            samples.append([item.id for item in opened.items])
    assert samples[1][:2] == samples[0]
    assert len(samples[1]) == 3


def test_without_the_harnesses_the_remedy_is_named(monkeypatch):
    monkeypatch.setenv("HYBRIDQUANT_EVAL_PYTHON", "/nowhere/python")
    with pytest.raises(BadInput, match="ms-vlmeval and lm-eval"):
        find_python()


def test_the_twelve_of_the_report_are_known():
    assert len(REPORT) == 12
    with pytest.raises(BadInput, match="did you mean chartqa"):
        choose_tasks("report", ["chartq"])
