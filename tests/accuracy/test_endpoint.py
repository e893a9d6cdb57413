"""Answers from a server: failures are counted and shown, and too many of them end the command."""

import pytest
from json_server import JsonHandler, serving

from accuracy.endpoint import ask_endpoint
from accuracy.paired import pair
from calibrate.samples import Sample
from checkpoint.faults import BadInput


def samples(count: int) -> list[Sample]:
    found = []
    for number in range(count):
        messages = [{"role": "user", "content": f"item {number}"}]
        found.append(Sample(str(number), messages, "test", "yes"))
    return found


@pytest.fixture
def endpoint():
    """A server of the OpenAI protocol: the test sets `reply`, from an item to (status, body)."""

    class Handler(JsonHandler):
        def do_GET(self):
            self.send(*self.server.models)

        def do_POST(self):
            self.send(*self.server.reply(self.request_body()["messages"][0]["content"]))

    models = (200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})
    with serving(Handler, models=models) as server:
        yield server


def completion(content):
    return 200, {
        "id": "1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"content": content}}],
    }


def test_answers_come_in_the_order_of_the_items(endpoint):
    endpoint.reply = lambda item: completion(item.upper())
    answers = ask_endpoint(endpoint.url, {"a": samples(20), "b": samples(3)})
    expected = [f"ITEM {number}" for number in range(20)]
    assert answers == {"a": expected, "b": expected[:3]}


@pytest.mark.parametrize("content", ["", "  ", None, 7])
def test_an_empty_answer_or_no_text_is_counted_and_never_right(endpoint, content):
    def reply(item):
        return completion(content if item == "item 1" else "yes")

    endpoint.reply = reply
    answers = ask_endpoint(endpoint.url, {"a": samples(4)})
    row = pair({"a": samples(4)}, {"a": ["yes"] * 4}, answers)[0]
    assert row.variant == 0.75
    assert row.empty == 1


def test_an_endpoint_that_is_down():
    with pytest.raises(BadInput, match="no server answers"):
        ask_endpoint("http://127.0.0.1:9", {"a": samples(1)})


def test_an_endpoint_of_another_protocol(endpoint):
    endpoint.models = (200, "<html>hello</html>")
    with pytest.raises(BadInput, match="does not answer as an OpenAI-compatible server"):
        ask_endpoint(endpoint.url, {"a": samples(1)})


def test_an_endpoint_without_a_model(endpoint):
    endpoint.models = (200, {"object": "list", "data": []})
    with pytest.raises(BadInput, match="serves no model"):
        ask_endpoint(endpoint.url, {"a": samples(1)})


def test_few_failed_requests_are_counted_wrong_and_many_end_the_command(endpoint):
    def reply(item):
        if item == "item 3":
            return 400, {"message": "no"}
        return completion("yes")

    endpoint.reply = reply
    answers = ask_endpoint(endpoint.url, {"a": samples(10)}, max_failed=0.1)
    assert answers["a"] == ["yes"] * 3 + [None] + ["yes"] * 6
    with pytest.raises(BadInput, match="1 of 10 requests failed, at most 2% may"):
        ask_endpoint(endpoint.url, {"a": samples(10)})


def test_the_paired_interval_holds_the_difference_and_narrows_with_items():
    def row(count):
        reference = ["yes"] * count
        variant = (["no"] + ["yes"] * 9) * (count // 10)
        return pair({"a": samples(count)}, {"a": reference}, {"a": variant})[0]

    few = row(40)
    many = row(400)
    assert few.difference == pytest.approx(-0.1)
    assert few.low < -0.1 < few.high <= 0
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_equal_answers_have_no_difference():
    answers = ["yes", "no", "yes", "no", ""]
    rows = pair({"a": samples(5)}, {"a": answers}, {"a": answers})
    assert [row.task for row in rows] == ["a", "mean"]
    for row in rows:
        assert (row.difference, row.low, row.high) == (0, 0, 0)
