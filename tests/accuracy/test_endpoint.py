"""Answers from a server: what is wrong with them is counted and shown, and too much of it ends the
command.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from accuracy.endpoint import ask_endpoint
from accuracy.paired import pair
from calibrate.samples import Sample
from checkpoint.faults import BadInput


def samples(count: int) -> list[Sample]:
    return [
        Sample(str(i), [{"role": "user", "content": f"item {i}"}], "test", "yes")
        for i in range(count)
    ]


@pytest.fixture
def endpoint():
    """A server of the OpenAI protocol whose answers the test decides: `server.reply(item) ->
    (status, body)`.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send(*self.server.models)

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send(*self.server.reply(request["messages"][0]["content"]))

        def send(self, status, body):
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.models = (200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def completion(content):
    return 200, {
        "id": "1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"content": content}}],
    }


def test_answers_come_in_the_order_of_the_items(endpoint):
    endpoint.reply = lambda item: completion(item.upper())
    answers = ask_endpoint(endpoint.url, {"a": samples(20), "b": samples(3)})
    assert answers == {"a": [f"ITEM {i}" for i in range(20)], "b": [f"ITEM {i}" for i in range(3)]}


@pytest.mark.parametrize("content", ["", "  ", None, 7])
def test_an_empty_answer_or_no_text_is_counted_and_never_right(endpoint, content):
    endpoint.reply = lambda item: completion(content if item == "item 1" else "yes")
    answers = ask_endpoint(endpoint.url, {"a": samples(4)})
    row = pair({"a": samples(4)}, {"a": ["yes"] * 4}, answers)[0]
    assert row.variant == 0.75
    assert row.empty == 1


def test_an_endpoint_that_is_down():
    with pytest.raises(BadInput, match="does not answer as an OpenAI endpoint"):
        ask_endpoint("http://127.0.0.1:9", {"a": samples(1)})


def test_an_endpoint_of_another_protocol(endpoint):
    endpoint.models = (200, "<html>hello</html>")
    with pytest.raises(BadInput, match="does not answer as an OpenAI endpoint"):
        ask_endpoint(endpoint.url, {"a": samples(1)})


def test_an_endpoint_without_a_model(endpoint):
    endpoint.models = (200, {"object": "list", "data": []})
    with pytest.raises(BadInput, match="serves no model"):
        ask_endpoint(endpoint.url, {"a": samples(1)})


def test_few_failed_requests_are_counted_wrong_and_many_end_the_command(endpoint):
    endpoint.reply = lambda item: (
        (400, {"message": "no"}) if item == "item 3" else completion("yes")
    )
    answers = ask_endpoint(endpoint.url, {"a": samples(10)}, max_failed=0.1)
    assert answers["a"] == [None if i == 3 else "yes" for i in range(10)]
    with pytest.raises(BadInput, match="1 of 10 requests failed, at most 2% may"):
        ask_endpoint(endpoint.url, {"a": samples(10)})


def test_the_paired_interval_holds_the_difference_and_narrows_with_items():
    def row(count):
        reference = ["yes"] * count
        variant = ["no" if i % 10 == 0 else "yes" for i in range(count)]
        return pair({"a": samples(count)}, {"a": reference}, {"a": variant})[0]

    few, many = row(40), row(400)
    assert few.difference == pytest.approx(-0.1)
    assert few.low < -0.1 < few.high <= 0
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_equal_answers_have_no_difference():
    rows = pair({"a": samples(5)}, {"a": ["yes", "no"] * 2 + [""]}, {"a": ["yes", "no"] * 2 + [""]})
    assert [(row.task, row.difference, row.low, row.high) for row in rows] == [
        ("a", 0, 0, 0),
        ("mean", 0, 0, 0),
    ]
