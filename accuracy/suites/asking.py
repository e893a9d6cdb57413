"""Asks a server the items of a task, many at once, and keeps every answer as it comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accuracy.suites.harness import Item, PromptText
from accuracy.suites.load import Load, Queue
from accuracy.suites.store import AnswerStore, Key, Reply
from checkpoint.faults import BadInput, shortened
from checkpoint.log import get_logger
from serve.media import media_url

if TYPE_CHECKING:
    from openai import OpenAI

logger = get_logger(__name__)

_END_OF_THINKING = "</think>"

TIMEOUT_SECONDS = 3600.0

_CHECKS = 3
_CHECK_SECONDS = 0.5


class ServerLost(Exception):
    """The server went away; what it had not answered is to be asked again."""


@dataclass(frozen=True)
class Profile:
    """How a model is asked.

    Attributes:
        system: The system message that turns reasoning on or off.
        max_tokens: Most tokens of an answer, where the task does not say.
        thinks: Whether answers begin with reasoning, which is not scored.
    """

    system: str = "/no_think"
    max_tokens: int = 1024
    thinks: bool = False


REASONING_OFF = Profile()
"""The report's settings: greedy, at most 1,024 new tokens."""

REASONING_ON = Profile(system="/think", max_tokens=16384, thinks=True)


@dataclass(frozen=True)
class Endpoint:
    """A server that answers.

    Attributes:
        client: An OpenAI client for it, which does not retry.
        model: The served name.
        is_alive: Returns whether the server still answers.
        queue: Returns how many requests it computes and how many wait; None if it does not say.
        media_root: Folder whose files it may read itself; None where clips must be sent.
    """

    client: OpenAI
    model: str
    is_alive: Callable[[], bool]
    queue: Callable[[], Queue | None]
    media_root: Path | None = None


@dataclass(frozen=True)
class Asking:
    """What is the same for all items that are asked together.

    Attributes:
        endpoint: Who is asked.
        profile: How.
        load: How many requests at a time.
    """

    endpoint: Endpoint
    profile: Profile
    load: Load


def ask_items(
    asking: Asking,
    items: Sequence[Item],
    prompt: Callable[[Item], PromptText],
    key: Callable[[Item], Key],
    store: AnswerStore,
    on_reply: Callable[[], None],
) -> None:
    """Ask items, and keep every reply in the store.

    A request that fails while the server lives is kept as failed.

    Args:
        asking: Whom and how.
        items: What to ask.
        prompt: Returns an item's prompt; several threads call it.
        key: Returns what an item's reply is kept under.
        store: Where.
        on_reply: Called after each reply.

    Raises:
        ServerLost: The server went away. Items without a reply in the store were not answered.
        OSError: A reply cannot be kept, as on a full disk.
    """
    lost = threading.Event()

    def ask_one(item: Item) -> None:
        with asking.load.request():
            if lost.is_set():
                return
            asked = prompt(item)
            reply = _request(asking, asked, lost)
        if reply is not None:
            try:
                store.add(key(item), asked.messages, reply)
            except OSError:
                lost.set()  # no answer can be kept any more, so none is asked for
                raise
            asking.load.answered()
            on_reply()

    with ThreadPoolExecutor(min(asking.load.most, max(1, len(items)))) as pool:
        pending = [pool.submit(ask_one, item) for item in items]
        try:
            for done in as_completed(pending):
                done.result()
        except BaseException:
            lost.set()
            raise
    if lost.is_set():
        raise ServerLost


def _request(asking: Asking, asked: PromptText, lost: threading.Event) -> Reply | None:
    """Send one request; None when the server went away."""
    from openai import APIConnectionError, APIStatusError, OpenAIError

    endpoint = asking.endpoint
    profile = asking.profile
    started = time.monotonic()
    try:
        completion = endpoint.client.chat.completions.create(
            model=endpoint.model,
            messages=_messages(asked, profile, endpoint.media_root),  # type: ignore[arg-type]
            temperature=0.0,
            max_tokens=_most_tokens(asked, profile),
            # A stop sequence of a task, such as an empty line, would end the reasoning.
            stop=None if profile.thinks else list(asked.stop) or None,
        )
        choice = completion.choices[0]
        text = choice.message.content or ""
    except (APIConnectionError, APIStatusError) as error:
        is_server = isinstance(error, APIConnectionError) or error.status_code >= 500
        if is_server and not _stays_alive(endpoint):
            lost.set()
            return None
        return Reply(None, error=shortened(error))
    # BadInput is of one item's picture, which no server could show.
    except (
        BadInput,
        OpenAIError,
        OSError,
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:
        return Reply(None, error=shortened(error) or type(error).__name__)
    usage = completion.usage
    return Reply(
        answer=text,
        finish_reason=choice.finish_reason,
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
        seconds=round(time.monotonic() - started, 3),
    )


def _most_tokens(asked: PromptText, profile: Profile) -> int:
    """Most tokens of an answer: the task's number, which leaves no room for reasoning."""
    if asked.max_tokens is None:
        return profile.max_tokens
    return max(asked.max_tokens, profile.max_tokens) if profile.thinks else asked.max_tokens


def _stays_alive(endpoint: Endpoint) -> bool:
    """Whether a server whose request failed answers, now and a moment later.

    The API server of vLLM answers for a moment after its engine has died.
    """
    for _ in range(_CHECKS):
        if not endpoint.is_alive():
            return False
        time.sleep(_CHECK_SECONDS)
    return endpoint.is_alive()


def _messages(asked: PromptText, profile: Profile, media_root: Path | None) -> list[dict[str, Any]]:
    """The OpenAI messages of a prompt, the system message before them."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": profile.system}]
    for message in asked.messages:
        content = message["content"]
        if message["role"] == "system":
            messages[0]["content"] = f"{profile.system}\n{content}"
            continue
        if not isinstance(content, str):
            content = [_part(part, media_root) for part in content]
        messages.append({"role": message["role"], "content": content})
    return messages


def _part(part: dict[str, Any], media_root: Path | None) -> dict[str, Any]:
    if "path" not in part:
        return part
    path = Path(part["path"])
    kind = part["type"]
    if media_root is not None and path.is_relative_to(media_root):
        url = path.as_uri()
    else:
        url = media_url(path, kind)
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def scored_text(reply: Reply, profile: Profile) -> str:
    """Return the part of an answer that is scored: what follows the reasoning, if there is any.

    Of reasoning that was cut off nothing follows.
    """
    text = reply.answer or ""
    if not profile.thinks:
        return text
    before, end, after = text.rpartition(_END_OF_THINKING)
    if not end and reply.finish_reason == "length":
        return ""
    return after.strip() if end else before + after


def unanswered(items: Iterable[Item], key: Callable[[Item], Key], store: AnswerStore) -> list[Item]:
    """Return the items without an answer: never asked, or the request failed."""
    left = []
    for item in items:
        reply = store.get(key(item))
        if reply is None or reply.answer is None:
            left.append(item)
    return left
