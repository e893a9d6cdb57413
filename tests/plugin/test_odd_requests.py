"""Numbers, texts and types of a request that vLLM itself finds out about too late, on a running
server.
"""

import base64
import io
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from chat_request import post_bytes, post_chat, post_json
from PIL import Image

HALF = "\ud800"
"""Half of a surrogate pair, which JSON can write and UTF-8 cannot."""

ODD = {
    "top_k": ({"top_k": 2**70}, "more than 64 bits"),
    "stream_interval": ({"stream_interval": 2**70}, "more than 64 bits"),
    "stop": ({"stop": [HALF]}, "surrogate pair"),
    "bad_words": ({"bad_words": [HALF]}, "surrogate pair"),
    "request_id": ({"request_id": HALF}, "surrogate pair"),
    "session_id": ({"session_id": HALF}, "surrogate pair"),
    "several answers": ({"top_k": 2**70, "n": 3}, "more than 64 bits"),
    "stream": ({"top_k": 2**70, "stream": True}, "more than 64 bits"),
    "a long number": ({"structured_outputs": {"json": "9" * 5000}}, "Exceeds the limit"),
}

USER = {"role": "user", "content": "Say 1."}

CHAT = "/v1/chat/completions"
BODIES = {
    CHAT: {"messages": [USER], "max_tokens": 1},
    "/v1/chat/completions/batch": {"messages": [[USER]], "max_tokens": 1},
    "/v1/completions": {"prompt": "1", "max_tokens": 1},
    "/v1/responses": {"input": "1", "max_output_tokens": 1, "store": False},
    "/v1/messages": {"messages": [USER], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [USER]},
    "/tokenize": {"messages": [USER]},
    "/detokenize": {"tokens": [1]},
    "/generative_scoring": {"query": "1", "items": ["2"], "label_token_ids": [5]},
    "/invocations": {"messages": [USER], "max_tokens": 1},
}
"""A good body for each address that reads one, without the model's name."""

WRONG = ([1], HALF)
"""The first is of a wrong type for almost every field, the second cannot be sent on."""


def in_part(**part):
    content = [{"type": "text", "text": "Say 1."}, part]
    return {"messages": [{"role": "user", "content": content}]}


FUNCTION = {"type": "function", "function": {"name": "f"}}
SAID_NOTHING = {
    "type": "message",
    "id": "1",
    "role": "assistant",
    "status": "completed",
    "content": [],
}
UNREAD = [
    (CHAT, {"structured_outputs": 5}, "check_structured_outputs_count"),
    ("/v1/completions", {"structured_outputs": []}, "check_structured_outputs_count"),
    ("/invocations", {"structured_outputs": "x"}, "check_structured_outputs_count"),
    (CHAT, {"tools": [{}], "tool_choice": FUNCTION}, "'function' (KeyError in vLLM's check_tool"),
    (CHAT, in_part(type="input_audio", input_audio=5), "parse_input_audio"),
    (CHAT, {"vllm_xargs": {"kv_transfer_params": 5}}, "`kv_transfer_params` is not a JSON object"),
    ("/v1/responses", {"vllm_xargs": {"ec_transfer_params": "x"}}, "is not a JSON object but 'x'"),
    ("/v1/responses", {"input": [SAID_NOTHING, USER]}, "list index"),
    ("/generative_scoring", {"cache_salt": HALF}, "surrogate pair"),
]


def post(server, **fields):
    """Ask for two tokens, and return (status, body)."""
    return post_chat(server, messages=[USER], max_tokens=2, **fields)


def post_fields(server, path, fields):
    """Send the address's good body with some fields changed."""
    return post_json(server, path, {"model": server.model, **BODIES[path], **fields})


@pytest.mark.server
def test_what_cannot_be_sent_to_the_engine_is_the_requests_fault(server):
    """Trap: vLLM 0.32 answers 500 with an empty message."""
    for name, (fields, part) in ODD.items():
        status, body = post(server, **fields)
        assert part in body, (name, body)
        # The head of a stream is sent before its request is packed.
        assert status == (200 if "stream" in fields else 400), (name, body)
    assert post(server)[0] == 200


@pytest.mark.server
@pytest.mark.parametrize(("path", "fields", "part"), UNREAD)
def test_what_vllm_cannot_read_is_the_requests_fault(server, path, fields, part):
    """Trap: vLLM 0.32 answers 500, "'int' object has no attribute 'get'"."""
    status, body = post_fields(server, path, fields)
    assert (status, part in body) == (400, True), body


@pytest.mark.server
def test_no_field_of_a_wrong_type_is_the_servers_fault(server):
    """Every field of every address that reads a body."""
    requests = list(wrong_fields(server))
    assert len({path for path, _ in requests}) == len(BODIES)
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda request: post_fields(server, *request), requests)
        for request, (status, body) in zip(requests, answers, strict=True):
            assert status < 500, (request, body)
    assert all(post_fields(server, path, {})[0] == 200 for path in BODIES)


def wrong_fields(server):
    """Yield an address and a field with a value, for all that the server's description names."""
    url = server.url.removesuffix("/v1") + "/openapi.json"
    described = json.loads(urllib.request.urlopen(url).read())
    for path in BODIES:
        for name in sorted(field_names(described, path)):
            for value in WRONG:
                yield path, {name: value}


def field_names(described, path):
    """The fields of what an address reads; those of a chat where it does not say."""
    posted = described["paths"][path]["post"]
    if "requestBody" not in posted:
        return field_names(described, CHAT)
    schema = posted["requestBody"]["content"]["application/json"]["schema"]
    names = set()
    for option in schema.get("anyOf", [schema]):
        model = option["$ref"].rpartition("/")[2]
        names |= set(described["components"]["schemas"][model]["properties"])
    return names


@pytest.mark.server
@pytest.mark.parametrize("body", [b"null", b"[]", b"[" * 100_000], ids=["null", "list", "deep"])
def test_a_body_that_is_no_object_is_the_requests_fault(server, body):
    for path in ("/invocations", "/scale_elastic_ep"):
        status, answer = post_bytes(server, path, body)
        assert 400 <= status < 500, answer


@pytest.mark.server
@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"user": HALF}, "surrogates"),
        ({"truncation": None}, "truncation"),
        ({"stop": [HALF]}, "pair"),
    ],
)
def test_a_stream_that_cannot_begin_ends_with_the_reason(server, fields, part):
    """Trap: vLLM 0.32 breaks the stream off, which its client sees as a broken connection."""
    status, body = post_fields(server, "/v1/responses", {"stream": True, **fields})
    assert status == 200
    event, _, data = body.rstrip().rpartition("\n\n")[2].partition("\n")
    assert event == "event: error"
    error = json.loads(data.removeprefix("data: "))["error"]
    assert error["code"] == 400
    assert part in error["message"]


@pytest.mark.server
def test_a_refused_request_does_not_spoil_the_next_with_its_picture(server):
    """Trap: vLLM 0.32 takes the picture for known to the engine, and answers 500 (issue 43941)."""
    file = io.BytesIO()
    Image.new("RGB", (61, 67), "olive").save(file, "PNG")
    picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": picture}}
    fields = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
    assert post_chat(server, **fields, temperature=-1)[0] == 400
    assert post_chat(server, **fields, top_k=2**70)[0] == 400
    for _ in range(2):
        status, body = post_chat(server, **fields)
        assert status == 200, body
