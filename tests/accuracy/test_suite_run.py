"""Asking a suite: what is kept, what is asked again, what has failed, and a server that dies."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ask_suite import plan_of
from json_server import JsonHandler, serving
from suite_data import CHART_ANSWERS, write_clip, write_videomme
from tokenizers import Tokenizer

from accuracy.suites.asking import REASONING_ON, scored_text
from accuracy.suites.needle import NeedleTask
from accuracy.suites.published import published_curve
from accuracy.suites.run import open_suite
from accuracy.suites.serving import Model
from accuracy.suites.store import AnswerStore, Key, Reply, content_hash
from checkpoint.faults import BadInput
from checkpoint.video import Video
from serve.process import ServerDied

HERE = Path(__file__).parent
UNPRUNED_CLIPS = Video(pruning_rate=0.0, max_frames=8)
ROOT = HERE.parents[1]


@pytest.fixture
def chat():
    """A server of the OpenAI protocol. `.asked` lists the questions, `reply(question)` returns
    status and answer.
    """

    class Handler(JsonHandler):
        def do_GET(self):
            self.send(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})

        def do_POST(self):
            request = self.request_body()
            self.server.requests.append(request)
            question = request["messages"][-1]["content"][-1]["text"].splitlines()[0]
            status, text = self.server.reply(question)
            message = {"role": "assistant", "content": text}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "tiny"}
            self.send(status, body | {"choices": [{"index": 0, "message": message}]})
            self.server.asked.append(question)

    with serving(Handler, asked=[], requests=[], reply=lambda question: (200, "100")) as server:
        yield server


def test_a_killed_run_resumes_without_asking_an_answered_item_again(folder, chat, tiny):
    held = threading.Event()
    killed = threading.Event()
    release = threading.Event()

    def held_reply(question):
        if len(chat.asked) == 3 and not killed.is_set():
            held.set()
            release.wait(60)
        return 200, "100"

    chat.reply = held_reply
    command = [sys.executable, str(HERE / "ask_suite.py"), str(folder), str(tiny), chat.url]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as run:
        assert held.wait(120)
        run.send_signal(signal.SIGKILL)
    killed.set()
    answered = list(chat.asked)
    assert len(answered) == 3
    chat.asked.clear()
    release.set()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(len(CHART_ANSWERS)), done.stderr
    again = [question for question in chat.asked if question in answered]
    assert not again


def test_a_failed_request_is_neither_right_nor_wrong_and_is_asked_again(folder, chat, tiny):
    def reply(question):
        return (400, "no") if question == "What is bar 0?" else (200, "40")

    chat.reply = reply
    model = Model(tiny, chat.url)
    with open_suite(plan_of(folder, ["chartqa"], concurrency=4), tiny) as run:
        first = run.scores(model, run.plan.video)["chartqa"]
        assert first.failed == 1
        assert first.asked == 6
        assert "0" not in first.scores
        assert first.scores["1"] == 1
        assert "400" in first.reasons[0]
        chat.asked.clear()
        chat.reply = lambda question: (200, "100")
        second = run.scores(model, run.plan.video)["chartqa"]
    assert chat.asked == ["What is bar 0?"]
    assert second.failed == 0
    assert second.scores["0"] == 1


def test_what_is_sent_is_the_reports_profile(folder, chat, tiny):
    with open_suite(plan_of(folder, ["chartqa"]), tiny) as run:
        run.scores(Model(tiny, chat.url), run.plan.video)
    request = chat.requests[0]
    assert request["messages"][0] == {"role": "system", "content": "/no_think"}
    assert (request["temperature"], request["max_tokens"]) == (0, 1024)
    picture = request["messages"][1]["content"][0]["image_url"]["url"]
    assert picture.startswith("data:image/png;base64,")


def test_a_needle_text_has_its_length_and_its_number(tiny):
    """At most the length, less the room for template and answer; the number at its depth."""
    task = NeedleTask(tiny / "tokenizer.json", context=8192, limit=3)
    assert [item.id for item in task.items] == [
        *("4096/0", "4096/32", "4096/63", "8192/0", "8192/32", "8192/63")
    ]
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    for item in task.items:
        text = task.prompt(item).messages[0]["content"]
        length, depth = map(int, item.id.split("/"))
        assert 0.9 * length < len(tokenizer.encode(text).ids) < length
        number = re.search(r"The number of the locker in \w+ is (\d+)\.", text)
        assert number.start() / len(text) == pytest.approx(depth / 63, abs=0.03)
        answers = {item.id: f"It is {number[1]}."}
        assert task.score(answers).scores == {item.id: 1}
        assert task.score({item.id: "It is 1."}).scores == {item.id: 0}


def test_a_server_asked_twice_shows_its_noise(folder, chat, tiny):
    def reply(question):
        is_second = chat.asked.count(question) == 1
        if question == "What is bar 0?":
            return 200, "99" if is_second else "100"  # within 5 %: scored alike
        if question == "What is bar 1?":
            return 200, "60" if is_second else "40"
        return 200, "same"

    chat.reply = reply
    model = Model(tiny, chat.url)
    with open_suite(plan_of(folder, ["chartqa"], repeats=2), tiny) as run:
        run.compare(model, [model])
        noise = run.noise(model)[0]
    assert (noise.items, noise.different, noise.scored_differently) == (6, 2, 1)


def test_a_server_that_dies_is_started_once_more(folder, tiny, dying):
    asked = dying(2)
    with open_suite(plan_of(folder, ["chartqa"]), tiny) as run:
        scores = run.scores(Model(tiny), run.plan.video)["chartqa"]
    assert scores.failed == 0
    questions = asked.read_text().splitlines()
    assert sorted(questions) == sorted(f"What is bar {number}?" for number in range(6))


def test_a_server_that_dies_twice_is_reported_and_its_answers_are_kept(folder, tiny, dying):
    asked = dying(2, 1)
    with open_suite(plan_of(folder, ["chartqa"]), tiny) as run:
        with pytest.raises(ServerDied, match="the server died twice"):
            run.scores(Model(tiny), run.plan.video)
        scores = run.scores(Model(tiny), run.plan.video)["chartqa"]
    assert scores.failed == 0
    assert len(asked.read_text().splitlines()) == 6


def test_the_evs_curve_is_asked_at_the_published_rates(tmp_path, tiny, dying):
    asked = dying()
    write_videomme(tmp_path, ["A", "B"], write_clip(tmp_path / "clip.mp4"))
    with open_suite(plan_of(tmp_path, ["video_mme"]), tiny) as run:
        points = run.curve([Model(tiny)])
        assert run.scores(Model(tiny), UNPRUNED_CLIPS)["video_mme"].failed == 0
    rates = [0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9]
    assert [point.rate for point in points] == rates
    # One server for each rate, and none for the rate that had been asked.
    started = Path(f"{asked}.rates").read_text().split()
    assert [float(rate) for rate in started] == rates
    assert published_curve("video_mme")["FP8 PTQ"][0.75] == 65.7
    assert not any(point.published for point in points)  # the data is not the published


def key(item: str) -> Key:
    return Key("chartqa", item, "settings")


def test_a_line_that_a_kill_left_half_written_is_cut_off(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerStore(path) as store:
        store.add(key("1"), [], Reply("one"))
        store.add(key("2"), [], Reply("two"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with AnswerStore(path) as store:
        assert store.get(key("1")) == Reply("one")
        assert store.get(key("2")) is None
        store.add(key("2"), [], Reply("two"))
    assert path.read_bytes() == whole


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"task": "chartqa"}\n')
    with pytest.raises(BadInput, match="line 1: is not an answer that was kept"):
        AnswerStore(path)


def test_directories_are_checked_before_the_first_is_asked(folder, chat, tiny, tiny_copy):
    (tiny_copy / "config.json").unlink()
    with open_suite(plan_of(folder, ["chartqa"]), tiny) as run:
        with pytest.raises(BadInput, match=r"config\.json"):
            run.compare(Model(tiny, chat.url), [Model(tiny_copy)])
    assert not chat.asked


def test_another_weight_is_another_model_and_the_manifest_is_not(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = content_hash(tmp_path)
    (tmp_path / "hybridquant.json").write_text("{}")
    assert content_hash(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert content_hash(tmp_path) != first


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (Reply("so A, no</think>\nB", finish_reason="stop"), "B"),
        (Reply("so A, no, B is", finish_reason="length"), ""),
        (Reply("B", finish_reason="stop"), "B"),
    ],
)
def test_reasoning_is_not_scored(reply, text):
    assert scored_text(reply, REASONING_ON) == text
