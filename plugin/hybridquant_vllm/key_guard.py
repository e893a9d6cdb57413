"""Asks for the key at every address of the server.

vLLM's own check looks at the beginning of the path and guards `/v1` and a few others.
`/invocations` takes the same requests and answers without a key, as do `/tokenize`,
`/generative_scoring` and `/scale_elastic_ep` (vLLM issue 58144; 0.32, 0.33). `hybridquant serve`
gives vLLM this class by `--middleware` where there is a key; it imports no vLLM.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"

OPEN_PATHS = frozenset({"/health", "/ping", "/metrics"})
"""What a load balancer and a monitor ask; nothing else answers without a key."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_REFUSAL = json.dumps({"error": {"message": "a key is needed", "code": 401}}).encode()


class KeyGuard:
    """An ASGI application that passes on requests with a key.

    Args:
        app: Where they are passed on to.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or pass a request on."""
        if _is_open(scope) or _has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSAL})


def _is_open(scope: Scope) -> bool:
    """Return whether anybody may ask, or nobody asks: when the server starts and ends."""
    if scope["type"] not in ("http", "websocket"):
        return True
    # A browser's question before a request, which cannot carry a key.
    if scope.get("method") == "OPTIONS":
        return True
    return scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS


def _has_key(scope: Scope) -> bool:
    given = b""
    for name, value in scope["headers"]:
        if name.lower() == b"authorization":
            given = value
    scheme, _, key = given.partition(b" ")
    if scheme.lower() != b"bearer":
        return False
    return any(hmac.compare_digest(key, known.encode()) for known in _keys(scope))


def _keys(scope: Scope) -> Iterable[str]:
    """Return the keys as vLLM finds them: those of its command line go before the variable's."""
    arguments = getattr(scope["app"].state, "args", None)
    keys = getattr(arguments, "api_key", None) or [os.environ.get(KEY_VARIABLE, "")]
    return [key for key in keys if key]
