"""Asks a served checkpoint one question, with images and videos.

    python -m serve.ask URL --text "What changes?" --video clip.mp4
    python -m serve.ask DIR --image page.png --image chart.png --text "Compare the two."

Prints the answer, the token counts and the time. With a URL it asks the server there; with a
directory it starts a server, asks, and stops it. The options that say how clips are seen apply to
a server that is started. Images come first in the prompt, then videos, then the texts, each in the
order given.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.command import command_name, command_parser, parse_command
from checkpoint.endpoint import connect, first_model, is_url
from checkpoint.faults import (
    BadInput,
    Fault,
    main,
    raise_if_any,
    raise_on_termination,
    shortened,
)
from checkpoint.log import get_logger
from serve.command import NO_HOST
from serve.environment import find_environment
from serve.media import decoding_faults, media_url
from serve.options import VIDEO_SETTINGS, add_setting_options, given_settings
from serve.preflight import checked_settings, token_faults
from serve.process import ServerDied, running_server
from serve.settings import ServeSettings

if TYPE_CHECKING:
    from openai import OpenAI

logger = get_logger("serve.ask")

TIMEOUT_SECONDS = 3600.0


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
        counts = f"{self.prompt_tokens} prompt tokens, {self.completion_tokens} completion tokens"
        return f"{self.text}\n[{counts}, {self.seconds:.2f} s]"


class RequestRefused(Exception):
    """The server could not answer; the message is the server's own."""


def content_parts(
    texts: Sequence[str] = (), images: Sequence[str | Path] = (), videos: Sequence[str | Path] = ()
) -> list[dict[str, Any]]:
    """Return OpenAI content parts: images, videos, texts.

    Files become base64 `data:` URLs; http, https, file and data URLs stay as they are.

    Raises:
        BadInput: With every file that is missing, unreadable, of another kind, or a picture of 16
            bits.
    """
    faults: list[Fault] = []
    parts: list[dict[str, Any]] = []
    for kind, sources in (("image", images), ("video", videos)):
        for source in sources:
            try:
                url = media_url(source, kind)
            except BadInput as bad:
                faults += bad.faults
                continue
            parts.append({"type": f"{kind}_url", f"{kind}_url": {"url": url}})
    raise_if_any(faults)
    for text in texts:
        parts.append({"type": "text", "text": text})
    return parts


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
        BadInput: The server calls the request bad: too long, too many images, media it cannot read.
        RequestRefused: The server fails or goes away.
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
        text = _server_message(error.body) or error.message
        if error.status_code >= 500:
            raise RequestRefused(shortened(text)) from None
        remedy = "change the prompt or the server's settings"
        if NO_HOST in text:
            remedy = "remote media are off: give the file, or serve with --allowed-media-domains"
        raise BadInput(Fault("request", shortened(text), remedy)) from None
    except APIError as error:
        raise RequestRefused(f"the server went away: {shortened(error)}") from None
    seconds = time.monotonic() - started
    usage = reply.usage
    assert usage is not None  # vLLM counts every request that is not streamed
    text = reply.choices[0].message.content or ""
    return Answer(text, usage.prompt_tokens, usage.completion_tokens, seconds)


def _server_message(body: object) -> str:
    if isinstance(body, dict):
        return str(body.get("message") or "")
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("serve.ask", __doc__)
    target_help = "checkpoint directory, or the URL of a running server"
    parser.add_argument("target", metavar="DIR|URL", help=target_help)
    parser.add_argument("--text", action="append", default=[], help="question; may be repeated")
    for kind in ("--image", "--video"):
        media_help = "file or URL; may be repeated"
        parser.add_argument(kind, action="append", default=[], metavar="FILE", help=media_help)
    tokens_help = "most tokens of the answer (default: 128)"
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help=tokens_help)
    temperature_help = "0 is greedy (default: 0)"
    parser.add_argument("--temperature", type=float, default=0.0, help=temperature_help)
    parser.add_argument("--think", action="store_true", help="let the model reason first")
    parser.add_argument("--model", help="served name (default: the first that the server lists)")
    add_setting_options(parser, (*VIDEO_SETTINGS, "api_key"))
    return parser


def _run() -> int:
    raise_on_termination()
    options = parse_command(_parser())
    raise_if_any(_option_faults(options))
    parts = content_parts(options.text, options.image, options.video)
    try:
        if is_url(options.target):
            print(_ask_server(options, parts))
        else:
            print(_serve_and_ask(options, parts))
    except (ServerDied, RequestRefused) as failed:
        logger.error("%s", failed)
        return 1
    return 0


def _option_faults(options: argparse.Namespace) -> Iterator[Fault]:
    """Yield faults of the options that argparse does not find."""
    asks = any(text.strip() for text in options.text)
    if not (asks or options.image or options.video):
        yield Fault("--text", "there is nothing to ask", "give --text, --image or --video")
    for text in options.text:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            yield Fault("--text", "is not UTF-8", "set the terminal's character set to UTF-8")
    if options.max_tokens < 1:
        yield Fault("--max-tokens", f"is {options.max_tokens}", "give 1 or more")
    if not 0 <= options.temperature < float("inf"):
        yield Fault("--temperature", f"is {options.temperature}", "give 0 or more, such as 0.6")
    if is_url(options.target):
        return
    if options.model is not None:
        what = "chooses a model of a running server, and one is started here"
        yield Fault("--model", what, "leave it out")
    for source in (*options.image, *options.video):
        if is_url(source) or source.lower().startswith("file://"):
            what = "is a URL, and the server that is started here fetches none"
            yield Fault(shortened(source), what, "give the path of a file")


def _ask_server(options: argparse.Namespace, parts: list[dict[str, Any]]) -> Answer:
    """Ask the server whose URL is given."""
    remedy = f"start it with {command_name('serve')} DIR and the option"
    fixed = given_settings(options)
    fixed.pop("api_key", None)
    raise_if_any(Fault(name, "cannot be changed on a running server", remedy) for name in fixed)
    client = connect(options.target, options.api_key, TIMEOUT_SECONDS)
    model = options.model or first_model(client)
    return ask(client, model, parts, options.max_tokens, options.temperature, options.think)


def _serve_and_ask(options: argparse.Namespace, parts: list[dict[str, Any]]) -> Answer:
    """Ask a server that is started for the question, on the directory that is given."""
    directory = Path(options.target)
    environment = find_environment()
    overrides = given_settings(options) | {"port": 0}
    # The prompt is known, so the server takes as many media as it has.
    for kind, sources in (("max_images", options.image), ("max_videos", options.video)):
        if len(sources) > getattr(ServeSettings(), kind):
            overrides[kind] = len(sources)
    sources = [*options.image, *options.video]
    raise_if_any(decoding_faults(sources, parts[: len(sources)]))
    settings = checked_settings(directory, overrides, (), environment)
    raise_if_any(token_faults("--max-tokens", options.max_tokens, directory, settings))
    with running_server(directory, settings, environment=environment) as server:
        client = server.client(TIMEOUT_SECONDS)
        return ask(
            client, server.model, parts, options.max_tokens, options.temperature, options.think
        )


if __name__ == "__main__":
    main(_run)
