"""Sends a server thousands of good and bad requests in mixed order, and watches its memory.

    python -m benchmarks.soak DIR --requests 10000 --at-once 12 --json FILE

Good requests are texts, pages, several pictures and clips. Bad ones are media that cannot be read,
too large, or of another type; prompts beyond the context; bodies that are not JSON. Clients vanish:
before their body is sent, while they wait, and in the middle of an answer. It passes when every
good request is answered, every bad one gets a 4xx with a reason, and nothing of the server is left
at the end. Memory is that of all its processes (resident set size, Linux).
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import random
import statistics
import struct
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.parts import write_json
from calibrate.sources.synthetic.kinds import draw
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import main
from checkpoint.libraries import installed_versions
from checkpoint.log import get_logger
from serve.environment import find_environment
from serve.process import Server, running_server, session_members
from serve.settings import settings_for

logger = get_logger("benchmarks.soak")

MB = 1e6

GOOD = ("text", "document", "images", "video_event", "video_static")
"""Kinds of the synthetic source."""

VANISHING = ("vanish unsent", "vanish waiting", "vanish reading")

POOL = 24
"""Samples drawn of each good kind; with few of them, vLLM's caches answer for most."""

SHARES = {"good": 0.6, "bad": 0.25, "vanishing": 0.15}

TIMEOUT = 120.0


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
        kind: Its kind.
        status: HTTP status; 0 when the client vanished, -1 when no answer came.
        reason: The answer of a refusal, shortened.
        seconds: From the connection to the last byte.
    """

    kind: str
    status: int
    reason: str
    seconds: float


def chat(model: str, *parts: dict[str, Any], **options: Any) -> bytes:
    """Return the body of a chat request with these parts and a question."""
    content = [*parts, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    return json.dumps({"model": model, "max_tokens": 8, "messages": messages} | options).encode()


def medium(kind: str, data: bytes, media_type: str) -> dict[str, Any]:
    """Return a part of a message: an `image` or a `video` in a `data:` URL."""
    url = f"data:{media_type};base64,{base64.b64encode(data).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def empty_png(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def clip_without_frames() -> bytes:
    """Return an MP4 that declares a video and holds no frame."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = 64
        stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    return buffer.getvalue()


def bad_bodies(model: str) -> dict[str, bytes]:
    """Return a body of each kind of bad request."""
    clip = _first_medium(draw("video_event", "soak-bad", 0).messages)
    page = _first_medium(draw("document", "soak-bad", 0).messages)
    picture = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}
    return {
        "corrupt clip": chat(model, medium("video", clip[: len(clip) // 2], "video/mp4")),
        "noise as a clip": chat(model, medium("video", bytes(range(256)) * 40, "video/mp4")),
        "clip without frames": chat(model, medium("video", clip_without_frames(), "video/mp4")),
        "page as a clip": chat(model, medium("video", page, "video/mp4")),
        "clip as a page": chat(model, medium("image", clip, "image/png")),
        "corrupt page": chat(model, medium("image", page[:200], "image/png")),
        "pixel bomb": chat(model, medium("image", empty_png(100_000, 100_000), "image/png")),
        "too many pixels": chat(model, medium("image", empty_png(15_000, 15_000), "image/png")),
        "remote page": chat(model, picture),
        "17 pages": chat(model, *[medium("image", page, "image/png")] * 17),
        "two clips": chat(model, *[medium("video", clip, "video/mp4")] * 2),
        "beyond the context": chat(model, {"type": "text", "text": "ab 12 " * 60_000}),
        "not JSON": b'{"model": ',
        "no messages": json.dumps({"model": model}).encode(),
        "another model": chat("nothing", {"type": "text", "text": "a"}),
        "no temperature": chat(model, temperature=-1),
    }


def _first_medium(messages: list[dict[str, Any]]) -> bytes:
    """Return the bytes of the first medium in a synthetic sample's messages."""
    for part in messages[-1]["content"]:
        if part["type"] != "text":
            url: str = part[part["type"]]["url"]
            return base64.b64decode(url.partition(",")[2])
    raise ValueError("the sample has no medium")


def good_bodies(model: str, kind: str) -> list[bytes]:
    """Return the bodies of `POOL` requests of a kind."""
    bodies = []
    for index in range(POOL):
        sample = draw(kind, "soak", index)
        body = {"model": model, "max_tokens": 8, "messages": list(sample.messages)}
        bodies.append(json.dumps(body).encode())
    return bodies


class Client:
    """Sends requests to one server.

    Args:
        url: Its address, with `/v1`.
    """

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._host = address.hostname or ""
        self._port = address.port or 80

    def send(self, kind: str, body: bytes, content_type: str = "application/json") -> Outcome:
        """Send a request and read its answer."""
        started = time.monotonic()
        connection = self._connect()
        try:
            self._begin(connection, body, content_type)
            connection.send(body)
            response = connection.getresponse()
            answer = response.read().decode("utf-8", "replace")
            status = response.status
        except (OSError, http.client.HTTPException) as error:
            status = -1
            answer = repr(error)
        finally:
            connection.close()
        reason = "" if status == 200 else answer[:200]
        return Outcome(kind, status, reason, time.monotonic() - started)

    def vanish(self, kind: str, body: bytes) -> Outcome:
        """Close the connection in the middle of a request.

        Args:
            kind: One of `VANISHING`: half of the body is sent, or the answer is not awaited, or
                its beginning is read.
            body: The request.
        """
        started = time.monotonic()
        connection = self._connect()
        try:
            self._begin(connection, body, "application/json")
            if kind == "vanish unsent":
                connection.send(body[: len(body) // 2])
            else:
                connection.send(body)
            if kind == "vanish reading":
                connection.getresponse().read(40)
        except (OSError, http.client.HTTPException) as error:
            return Outcome(kind, -1, repr(error), time.monotonic() - started)
        finally:
            connection.close()
        return Outcome(kind, 0, "", time.monotonic() - started)

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT)

    @staticmethod
    def _begin(connection: http.client.HTTPConnection, body: bytes, content_type: str) -> None:
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Type", content_type)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()


def requests_in_order(model: str, count: int, client: Client) -> list[Callable[[], Outcome]]:
    """Return the requests, shuffled, each bad kind among them; the same for the same count."""
    chosen = random.Random(0)
    good = {kind: good_bodies(model, kind) for kind in GOOD}
    bad = bad_bodies(model)
    bad_kinds = [*bad, "wrong content type"]
    made = [_bad_request(client, kind, bad) for kind in bad_kinds]
    while len(made) < count:
        (group,) = chosen.choices(list(SHARES), list(SHARES.values()))
        if group == "bad":
            made.append(_bad_request(client, chosen.choice(bad_kinds), bad))
            continue
        kind = chosen.choice(GOOD)
        body = chosen.choice(good[kind])
        if group == "good":
            made.append(lambda kind=kind, body=body: client.send(kind, body))  # type: ignore[misc]
            continue
        streamed = json.dumps(json.loads(body) | {"stream": True, "max_tokens": 200}).encode()
        way = chosen.choice(VANISHING)
        made.append(lambda way=way, body=streamed: client.vanish(way, body))  # type: ignore[misc]
    chosen.shuffle(made)
    return made


def _bad_request(client: Client, kind: str, bad: dict[str, bytes]) -> Callable[[], Outcome]:
    if kind == "wrong content type":
        return lambda: client.send(kind, bad["no messages"], "text/plain")
    return lambda: client.send(kind, bad[kind])


def resident_bytes(leader: int) -> int:
    """Return the resident memory of all processes of the session that `leader` leads."""
    total = 0
    for member in session_members(leader):
        try:
            pages = int(Path(f"/proc/{member}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue  # it has ended
        total += pages * 4096
    return total


def soak(server: Server, count: int, at_once: int) -> dict[str, Any]:
    """Send requests to a server.

    Args:
        server: One that answers.
        count: Number of requests.
        at_once: Clients at the same time.

    Returns:
        What `summary` returns, and the server's memory.
    """
    client = Client(server.url)
    waiting = requests_in_order(server.model, count, client)
    memory: list[int] = []
    outcomes: list[Outcome] = []
    step = max(1, count // 40)
    started = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        for begin in range(0, count, step):
            part = waiting[begin : begin + step]
            outcomes += pool.map(lambda request: request(), part)
            memory.append(resident_bytes(server.process.pid))
            rate = len(outcomes) / (time.monotonic() - started)
            logger.info("%d of %d requests, %.1f/s", len(outcomes), count, rate)
    # The first quarter fills caches of fixed size.
    warm = memory[len(memory) // 4]
    return summary(outcomes) | {
        "seconds": round(time.monotonic() - started, 1),
        "at_once": at_once,
        "memory_mb": [round(size / MB) for size in memory],
        "growth_after_first_quarter": round(memory[-1] / warm - 1, 4),
    }


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Count outcomes.

    Returns:
        `requests`: by kind, number by status and median and longest time in seconds. `unanswered`:
        good requests without an answer. `not_refused`: bad requests without a 4xx and a reason.
    """
    kinds: dict[str, Any] = {}
    for kind in sorted({outcome.kind for outcome in outcomes}):
        same = [outcome for outcome in outcomes if outcome.kind == kind]
        seconds = [outcome.seconds for outcome in same]
        statuses: dict[str, int] = {}
        for outcome in same:
            statuses[str(outcome.status)] = statuses.get(str(outcome.status), 0) + 1
        kinds[kind] = {
            "statuses": statuses,
            "median_seconds": round(statistics.median(seconds), 3),
            "longest_seconds": round(max(seconds), 3),
        }
    unanswered = []
    not_refused = []
    for outcome in outcomes:
        line = f"{outcome.kind}: {outcome.status} {outcome.reason}"
        if outcome.kind in GOOD and outcome.status != 200:
            unanswered.append(line)
        is_bad = outcome.kind not in GOOD and outcome.kind not in VANISHING
        if is_bad and not (400 <= outcome.status < 500 and outcome.reason):
            not_refused.append(line)
    return {
        "count": len(outcomes),
        "requests": kinds,
        "unanswered": unanswered,
        "not_refused": not_refused,
    }


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status: 1 when a request was not treated as it should."""
    options = parse_command(_parser(), arguments)
    environment = find_environment()
    settings = settings_for(options.directory, {"port": 0})
    with running_server(options.directory, settings, environment=environment) as server:
        found = soak(server, options.requests, options.at_once)
        leader = server.process.pid
    left = resident_bytes(leader)
    found |= {
        "command": "python -m benchmarks.soak DIR " + " ".join(arguments[1:]),
        "vllm": environment.version,
        "device": environment.device.name,
        "versions": installed_versions(),
        "bytes_left_after_stop": left,
    }
    if options.json:
        write_json(options.json, found)
    print(f"{found['count']} requests in {found['seconds']} s")
    print(f"good requests without an answer: {len(found['unanswered'])}")
    print(f"bad requests without a 4xx and a reason: {len(found['not_refused'])}")
    print(f"memory after the first quarter: {found['growth_after_first_quarter']:+.1%}")
    for line in [*found["unanswered"], *found["not_refused"]][:20]:
        print(f"  {line}")
    return int(bool(found["unanswered"] or found["not_refused"] or left))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.soak", __doc__)
    parser.add_argument("directory", metavar="DIR", type=Path, help="checkpoint directory")
    parser.add_argument("--requests", type=int, default=10_000, help="number of requests")
    parser.add_argument("--at-once", type=int, default=12, help="clients at the same time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    return parser


if __name__ == "__main__":
    main(lambda: run(sys.argv[1:]))
