"""Answers requests that vLLM cannot read with 400 and the reason.

vLLM looks into a request before it knows the types in it: a validator takes `structured_outputs`
for an object, the search for media takes a part's type for a text. It answers 500 then, as if the
server were at fault, and breaks off a stream of `/v1/responses`. Here such a request gets 400, the
error, and the name of the function that could not read it, which says what of the request it was;
a stream that has begun ends with an event that says so.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.logger import init_logger

logger = init_logger("vllm.hybridquant")

FAULTS = (AssertionError, AttributeError, LookupError, RecursionError)
"""What reading a value of a wrong type raises, beside the ValueError and TypeError that vLLM
answers with 400 itself."""

APPLICATION = "vllm.entrypoints.launchers.app"
"""vLLM's module that puts the server together; only the processes that serve have imported it."""

_LONGEST_REASON = 200
_STREAM = b"text/event-stream"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class _Progress:
    """How far a request has come.

    Attributes:
        is_sent: Whether the engine was given it. What fails then is no fault of the request.
        has_begun: Whether its answer has begun.
        is_stream: Whether that is a stream of events.
    """

    def __init__(self) -> None:
        self.is_sent = False
        self.has_begun = False
        self.is_stream = False


_CURRENT: ContextVar[_Progress | None] = ContextVar("hybridquant_request", default=None)
"""The present request's. Tasks that are started for it share the object."""


def note_sent() -> None:
    """Remember that the present request has been read."""
    progress = _CURRENT.get()
    if progress is not None:
        progress.is_sent = True


class UnreadRequests:
    """An ASGI application that answers for those requests that another one cannot read.

    Args:
        app: The other one.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer it where that fails."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        progress = _Progress()
        _CURRENT.set(progress)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                progress.has_begun = True
                kind = dict(message.get("headers", ())).get(b"content-type", b"")
                progress.is_stream = kind.startswith(_STREAM)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            if progress.is_stream:
                await _end_stream(send, _cause(error), progress.is_sent)
            elif isinstance(error, FAULTS) and not progress.is_sent and not progress.has_begun:
                await _refuse(send, error)
            else:
                raise


def _cause(error: Exception) -> BaseException:
    """Return what ended a stream: starlette raises a RuntimeError from it."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return error.__cause__
    return error


async def _refuse(send: Send, error: Exception) -> None:
    body = _described(f"the request cannot be read: {reason(error)}", 400)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _end_stream(send: Send, error: BaseException, is_sent: bool) -> None:
    is_fault = isinstance(error, (VLLMClientError, ValueError, TypeError, *FAULTS))
    code = 400 if is_fault and not is_sent else 500
    if code == 500:
        logger.error("hybridquant: a stream has ended early", exc_info=error)
    event = b"event: error\ndata: %s\n\n" % _described(reason(error), code)
    await send({"type": "http.response.body", "body": event, "more_body": False})


def _described(message: str, code: int) -> bytes:
    """Return an error as vLLM, OpenAI's client and Anthropic's write it, in ASCII."""
    kind = "BadRequestError" if code == 400 else "InternalServerError"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"type": "error", "error": error}).encode()


def reason(error: BaseException) -> str:
    """Return what an error says, its type, and the function of vLLM that it comes from."""
    what = str(error)[:_LONGEST_REASON].strip()
    kind = type(error).__name__
    functions = [
        frame.f_code.co_name
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if _is_vllms(frame.f_globals.get("__name__", ""), frame.f_code.co_name)
    ]
    if functions:
        kind = f"{kind} in vLLM's {functions[-1]}"
    return f"{what} ({kind})" if what else kind


def _is_vllms(module: str, function: str) -> bool:
    return module.startswith("vllm.") and not function.startswith("<")


def is_server() -> bool:
    """Return whether this process will answer requests."""
    return APPLICATION in sys.modules


def register() -> None:
    """Let the server that this process will build answer for requests that it cannot read."""
    if not is_server():
        return
    application: Any = sys.modules[APPLICATION]
    add_middleware = application.init_entrypoints_middleware
    if hasattr(add_middleware, "__wrapped__"):  # registered before
        return

    @functools.wraps(add_middleware)
    def with_ours(args: Any, app: Any, *rest: Any) -> None:
        app.add_middleware(UnreadRequests)
        add_middleware(args, app, *rest)

    application.init_entrypoints_middleware = with_ours
