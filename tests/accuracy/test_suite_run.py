"""Asking a suite: what is sent and kept, and how a run ends that cannot go on."""

import errno
import os
import re
import socket
from pathlib import Path

import pytest
from ask_suite import kept_answers, plan_of
from json_server import JsonHandler, serving
from tokenizers import Tokenizer

from accuracy.suites.asking import REASONING_ON, scored_text
from accuracy.suites.needle import NeedleTask
from accuracy.suites.run import open_suite
from accuracy.suites.serving import Model
from accuracy.suites.store import AnswerStore, Key, Reply
from checkpoint.content import content_hash
from checkpoint.faults import BadInput
from serve.process import ServerDied


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


def test_a_full_disk_ends_the_run_and_names_the_file(folder, chat, tiny, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with open_suite(plan_of(folder, ["chartqa"]), tiny) as run:
        with pytest.raises(OSError, match="No space left on device") as caught:
            run.scores(Model(tiny, chat.url), run.plan.video)
    assert Path(caught.value.filename).is_relative_to(folder / "out/answers")
    assert len(chat.asked) == 1


def test_an_endpoint_that_goes_away_is_reported_and_nothing_counts_as_failed(folder, tiny):
    """Four of six items are answered; then nothing listens there any more."""

    class Handler(JsonHandler):
        def do_GET(self):
            self.send(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})

        def do_POST(self):
            self.request_body()
            message = {"role": "assistant", "content": "100"}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "tiny"}
            self.send(200, body | {"choices": [{"index": 0, "message": message}]})
            self.server.left -= 1
            if not self.server.left:
                self.server.socket.shutdown(socket.SHUT_RDWR)

    with serving(Handler, left=4) as server:
        with open_suite(plan_of(folder, ["chartqa"]), tiny) as run:
            with pytest.raises(ServerDied, match=f"{server.url}: the server no longer answers"):
                run.scores(Model(tiny, server.url), run.plan.video)
    kept = kept_answers(folder / "out")
    assert len(kept) == 4
    assert all(line["answer"] == "100" for line in kept)


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


def test_another_weight_is_another_model_and_manifest_report_and_card_are_not(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = content_hash(tmp_path)
    for written_later in ("hybridquant.json", "report.html", "README.md", ".cached"):
        (tmp_path / written_later).write_text("{}")
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
