"""Asks a served checkpoint one question, with images and videos, and prints answer, token counts
and time.

    python -m serve.ask URL --text "What changes?" --video clip.mp4
    python -m serve.ask DIR --image page.png --image chart.png --text "Compare the two."
    --max-tokens 64

With a URL it asks the server there; with a directory it starts one, asks, and stops it. Images come
first in the prompt, then videos, then the texts, each in the order given.
"""

from __future__ import annotations

import argparse
import base64
import mimetypes
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.faults import BadInput, Fault, main, raise_if_any
from serve.process import ServerDied, running_server
from serve.settings import served

if TYPE_CHECKING:
    from openai import OpenAI

# mimetypes reads the system's table, and a slim container has none.
_TYPES = {
    ".webp": "image/webp",
    ".mkv": "video/x-matroska",
    ".webm": "video/webm",
    ".mp4": "video/mp4",
}


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: The answer.
        prompt_tokens: Tokens of the prompt as the language model saw it: after EVS, frame texts
            included.
        completion_tokens: Tokens of the answer.
        seconds: From the request to the last token.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.text}\n[{self.prompt_tokens} prompt tokens, {self.completion_tokens} completion tokens, "
            f"{self.seconds:.2f} s]"
        )


class RequestRefused(Exception):
    """The server could not answer; the message is the server's own."""


def content_parts(
    texts: Sequence[str] = (), images: Sequence[str | Path] = (), videos: Sequence[str | Path] = ()
) -> list[dict[str, Any]]:
    """OpenAI content parts: files as base64 `data:` URLs, http, https, file and data URLs as they
    are.

    Raises:
        BadInput: With every file that is missing, unreadable, or by its name no image or video.
    """
    faults: list[Fault] = []
    parts = []
    for kind, sources in (("image", images), ("video", videos)):
        for source in sources:
            try:
                parts.append(
                    {"type": f"{kind}_url", f"{kind}_url": {"url": media_url(source, kind)}}
                )
            except BadInput as bad:
                faults += bad.faults
    raise_if_any(faults)
    return [*parts, *({"type": "text", "text": text} for text in texts)]


def media_url(source: str | Path, kind: str) -> str:
    """URL of an image or a video; `kind` is `image` or `video`.

    Raises:
        BadInput: When the file cannot be read, or its name says it is something else.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://", "file://", "data:")):
        return source
    path = Path(source)
    guessed = _TYPES.get(path.suffix.lower()) or mimetypes.guess_type(path.name)[0] or ""
    if not guessed.startswith(kind + "/"):
        raise BadInput(
            Fault(str(path), f"is by its name no {kind}", f"give --{kind} a {kind} file")
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(
            Fault(str(path), error.strerror or "cannot be read", "check the path")
        ) from None
    return f"data:{guessed};base64,{base64.b64encode(data).decode()}"


def connect(url: str) -> OpenAI:
    """An OpenAI client for a server at `url`, with or without `/v1`.

    Raises:
        BadInput: When the openai package is missing.
    """
    try:
        from openai import OpenAI
    except ImportError:
        raise BadInput(
            Fault("openai", "is not installed here", f"{sys.executable} -m pip install openai")
        ) from None
    root = url.rstrip("/")
    return OpenAI(
        base_url=root if root.endswith("/v1") else f"{root}/v1",
        api_key="none",
        max_retries=0,
        timeout=3600,
    )


def first_model(client: OpenAI) -> str:
    """The name of the model that the server lists first.

    Raises:
        BadInput: When nobody answers there.
    """
    from openai import OpenAIError

    try:
        return client.models.list().data[0].id
    except OpenAIError as error:
        raise BadInput(
            Fault(
                str(client.base_url),
                f"no server answers: {error}",
                "start one: python -m serve DIR",
            )
        ) from None


def ask(
    client: OpenAI,
    model: str,
    parts: Sequence[dict[str, Any]],
    max_tokens: int = 128,
    temperature: float = 0.0,
    think: bool = False,
) -> Answer:
    """Ask one question.

    Args:
        client: From `connect`.
        model: Served name.
        parts: From `content_parts`.
        max_tokens: Most tokens of the answer.
        temperature: 0 is greedy.
        think: Let the model reason before it answers (`/think` as the system message instead of
            `/no_think`).

    Raises:
        BadInput: When the server calls the request bad: too long, too many images, media it cannot
            read.
        RequestRefused: When the server fails or goes away.
    """
    from openai import APIError, APIStatusError

    messages: Any = [
        {"role": "system", "content": "/think" if think else "/no_think"},
        {"role": "user", "content": list(parts)},
    ]
    started = time.monotonic()
    try:
        reply = client.chat.completions.create(
            model=model, messages=messages, max_tokens=max_tokens, temperature=temperature
        )
    except APIStatusError as error:
        text = _server_text(error.body) or error.message
        if error.status_code < 500:
            raise BadInput(
                Fault("request", text, "change the prompt or the server's settings")
            ) from None
        raise RequestRefused(text) from None
    except APIError as error:
        raise RequestRefused(f"the server went away: {error}") from None
    seconds = time.monotonic() - started
    usage = reply.usage
    assert usage is not None  # vLLM always counts a request that is not streamed
    return Answer(
        reply.choices[0].message.content or "",
        usage.prompt_tokens,
        usage.completion_tokens,
        seconds,
    )


def _server_text(body: object) -> str:
    if isinstance(body, dict):
        return str(body.get("message") or "")
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve.ask", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "target", metavar="DIR|URL", help="checkpoint directory, or the URL of a running server"
    )
    parser.add_argument("--text", action="append", default=[], help="question; may be repeated")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="file or URL; may be repeated"
    )
    parser.add_argument(
        "--video", action="append", default=[], metavar="FILE", help="file or URL; may be repeated"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=128, help="most tokens of the answer (128)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    parser.add_argument("--think", action="store_true", help="let the model reason first")
    parser.add_argument("--model", help="served name (the first that the server lists)")
    parser.add_argument(
        "--video-pruning-rate", metavar="Q", type=float, help="EVS rate, when a server is started"
    )
    return parser


def _run(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if not (options.text or options.image or options.video):
        raise BadInput(
            Fault("--text", "there is nothing to ask", "give --text, --image or --video")
        )
    parts = content_parts(options.text, options.image, options.video)
    rest = (options.max_tokens, options.temperature, options.think)
    try:
        if options.target.startswith(("http://", "https://")):
            if options.video_pruning_rate is not None:
                remedy = "start it with python -m serve DIR --video-pruning-rate Q"
                raise BadInput(
                    Fault("--video-pruning-rate", "cannot be changed on a running server", remedy)
                )
            client = connect(options.target)
            print(ask(client, options.model or first_model(client), parts, *rest))
            return 0
        overrides = {"port": 0, "video_pruning_rate": options.video_pruning_rate}
        settings = served(Path(options.target), overrides).settings
        with running_server(options.target, settings) as server:
            print(ask(connect(server.url), server.model, parts, *rest))
        return 0
    except (ServerDied, RequestRefused) as failed:
        print(f"error: {failed}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    main(_run)
