"""ReplaySSM and states of 16 bits: what is served, and how answers and texts are compared."""

import contextlib

import pytest
from json_server import JsonHandler, serving

from benchmarks import state_accuracy
from benchmarks.paired_servers import Asker
from benchmarks.parts import Parts
from benchmarks.state_accuracy import REFERENCE, WAYS, _ways, compared, equal_tokens, sides_of
from checkpoint.faults import BadInput
from serve.environment import CPU, Gpu, ServeEnvironment, cuda_device
from serve.state_update import STATE_FLAG
from tiny.tasks import items

H100 = cuda_device([Gpu((9, 0), "H100", 85e9, 84e9)])


def test_every_way_names_the_type_of_its_state(tiny):
    sides = sides_of(tiny, list(WAYS), (), ServeEnvironment("python", (0, 33, 0), H100, "0.2.1"))
    states = {side.name: side.flags[side.flags.index(STATE_FLAG) + 1] for side in sides}
    assert states[REFERENCE] == "float32"
    assert all(state in name for name, state in states.items())
    assert {side.name for side in sides if side.settings} == {
        "ReplaySSM, float32 state",
        "ReplaySSM, float16 state",
    }


def test_a_server_on_a_cpu_gets_no_flags_of_a_gpu(tiny):
    environment = ServeEnvironment("python", (0, 32, 0), CPU, "0.2.1")
    (side,) = sides_of(tiny, [REFERENCE], ("--max-model-len", "4096"), environment)
    assert "--gpu-memory-utilization" not in side.flags


def test_the_reference_comes_first_and_unknown_ways_are_refused():
    assert _ways(None) == list(WAYS)
    assert _ways("float16 state") == [REFERENCE, "float16 state"]
    with pytest.raises(BadInput, match="has 'int8 state'"):
        _ways("float16 state; int8 state")


def test_answers_and_texts_are_compared_with_the_reference():
    samples = {"text": items("text", "test", 4)}
    right = [sample.answer for sample in samples["text"]]
    wrong = [*right[:3], "another"]
    texts = [["a", "b", "c"], ["a", "b", "c"]]
    found = {
        REFERENCE: {"answers": {"text": right}, "texts": texts},
        "float16 state": {"answers": {"text": wrong}, "texts": [texts[0], ["a", "x", "c"]]},
    }
    (row,) = compared(samples, found).values()
    assert row["differing"] == {"text": 1}
    assert row["tasks"][0]["difference"] == pytest.approx(-0.25)
    assert row["equal_tokens"] == {"median": 2.0, "least": 1}
    assert row["equal_texts"] == 1
    assert equal_tokens("ab", "abc") == 2


class Answering(JsonHandler):
    """Gives one answer to every question, and one continuation of every text."""

    def do_GET(self):
        self.send(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def do_POST(self):
        self.request_body()
        if self.path.endswith("/chat/completions"):
            message = {"role": "assistant", "content": self.server.answer}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "tiny"}
            self.send(200, reply | {"choices": [choice]})
        else:
            self.send(200, {"choices": [{"logprobs": {"tokens": ["token_id:5"]}}]})


def test_on_a_gpu_all_servers_are_asked_at_once(tiny, tmp_path, monkeypatch):
    environment = ServeEnvironment("python", (0, 33, 0), H100, "0.2.0")
    monkeypatch.setattr(state_accuracy, "find_environment", lambda: environment)
    samples = {"text": items("text", "test", 3)}
    right = samples["text"][0].answer
    ways = [REFERENCE, "float16 state", "ReplaySSM, float16 state"]
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(serving(Answering, answer=right))
        other = stack.enter_context(serving(Answering, answer="another"))

        class Started:
            """Two servers answer, and one has not started."""

            def __init__(self, *_):
                self.askers = {ways[0]: Asker(one.url), ways[1]: Asker(other.url)}
                self.failed = {ways[2]: "no kernel"}

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def start(self, sides):
                assert [side.name for side in sides] == ways

        monkeypatch.setattr(state_accuracy, "Servers", Started)
        parts = Parts(tmp_path / "parts.json", {})
        rows = state_accuracy.measure(tiny, ways, (), samples, 1, parts)
    assert rows[ways[1]]["differing"] == {"text": 3}
    assert rows[ways[1]]["equal_texts"] == state_accuracy.TEXTS
    assert rows[ways[2]] == {"not_started": "no kernel"}
