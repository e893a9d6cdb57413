"""Numbers and texts of a request that vLLM itself finds out about too late, on a running server."""

import pytest
from chat_request import post_chat

HALF = "\ud800"
"""Half of a surrogate pair, which JSON can write and UTF-8 cannot."""

ODD = {
    "top_k": ({"top_k": 2**70}, "more than 64 bits"),
    "stream_interval": ({"stream_interval": 2**70}, "more than 64 bits"),
    "stop": ({"stop": [HALF]}, "surrogate pair"),
    "bad_words": ({"bad_words": [HALF]}, "surrogate pair"),
    "request_id": ({"request_id": HALF}, "surrogate pair"),
    "several answers": ({"top_k": 2**70, "n": 3}, "more than 64 bits"),
    "stream": ({"top_k": 2**70, "stream": True}, "more than 64 bits"),
}


def post(server, **fields):
    """Ask for two tokens, and return (status, body)."""
    message = {"role": "user", "content": "Say 1."}
    return post_chat(server, messages=[message], max_tokens=2, **fields)


@pytest.mark.server
def test_what_cannot_be_sent_to_the_engine_is_the_requests_fault(server):
    """Trap: vLLM 0.32 answers 500 with an empty message."""
    for name, (fields, part) in ODD.items():
        status, body = post(server, **fields)
        assert part in body, (name, body)
        # The head of a stream is sent before its request is packed.
        assert status == (200 if "stream" in fields else 400), (name, body)
    assert post(server)[0] == 200
