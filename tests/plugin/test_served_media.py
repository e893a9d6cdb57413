"""Bad media on a running server: 400 with a reason at once, while good requests are answered."""

import base64
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from chat_request import post_chat
from plugin_media import CLIPS, ODD_CLIPS, clip, sound

from benchmarks.soak import empty_png


def ask(server, kind, data):
    """Ask about one medium and return (status, answer or reason, seconds)."""
    return ask_url(server, kind, f"data:{kind}/x;base64,{base64.b64encode(data).decode()}")


def ask_url(server, kind, url):
    """Ask about the medium of a URL."""
    parts = [{"type": f"{kind}_url", f"{kind}_url": {"url": url}}]
    parts.append({"type": "text", "text": "What is it?"})
    started = time.monotonic()
    message = {"role": "user", "content": parts}
    status, text = post_chat(server, max_tokens=4, messages=[message])
    if status == 200:
        text = json.loads(text)["choices"][0]["message"]["content"]
    return status, text, time.monotonic() - started


BAD = {
    "truncated": ("video", clip()[:900], "video cannot be read"),
    "sound": ("video", sound(), "no video stream"),
    "8K": ("video", clip(2, 2, size=(7680, 4320), options={"preset": "ultrafast"}), "at most"),
    "bomb": ("image", empty_png(100_000, 100_000), "make it smaller"),
    "bomb as a clip": ("video", empty_png(100_000, 100_000), "file is a picture"),
}


@pytest.mark.server
def test_bad_media_are_refused_while_good_ones_are_answered(server):
    good = [CLIPS["h264, short groups"], ODD_CLIPS["no duration"], ODD_CLIPS["one frame"]]
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(ask, server, "video", data) for data in good]
        refused = {name: ask(server, kind, data) for name, (kind, data, _) in BAD.items()}
        statuses = [answer.result()[0] for answer in answers]
    assert statuses == [200, 200, 200]
    for name, (status, reason, seconds) in refused.items():
        assert status == 400, (name, reason)
        assert BAD[name][2] in reason
        assert seconds < 2, name  # under one where nothing else runs
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert log.count("fast video replaces") == 1


BAD_URLS = {
    "data:image/png,abc": "Only base64 data URLs",
    "file:///etc/hostname": "--allowed-local-media-path",
    "http://127.0.0.1:9/picture.png": "remote-media-are-off.invalid",
}


@pytest.mark.server
def test_a_url_that_is_not_allowed_is_the_requests_fault(server):
    """test_fetching.py tries many more without a server."""
    for kind in ("image", "video"):
        for url, part in BAD_URLS.items():
            status, reason, _ = ask_url(server, kind, url)
            assert status == 400, (kind, url, reason)
            assert part in reason
