"""Asks a server that we have started: whether it is ready, and what it serves.

It is on this machine, so no proxy is asked and its certificate is not checked.
"""

from __future__ import annotations

import json
import os
import ssl
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpoint.endpoint import KEY_VARIABLE, connect
from serve.settings import ServeSettings

if TYPE_CHECKING:
    from openai import OpenAI

_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
"""Where to reach a server that listens on all addresses."""


@dataclass(frozen=True)
class OwnServer:
    """A server that we have started.

    Attributes:
        url: Its root, without `/v1`.
        api_key: Its key; None if it wants none.
    """

    url: str
    api_key: str | None = None

    def is_healthy(self) -> bool:
        """Return whether it answers."""
        try:
            with self._open("/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:  # refused, reset, or an error status
            return False

    def served_name(self) -> str:
        """Return the first model name that it lists.

        Raises:
            OSError: It does not answer.
        """
        with self._open("/v1/models", timeout=10) as response:
            return str(json.load(response)["data"][0]["id"])

    def client(self, timeout: float) -> OpenAI:
        """Return an OpenAI client for it; `timeout` is in seconds."""
        return connect(self.url, self.api_key, timeout, is_own=True)

    def _open(self, path: str, timeout: float) -> Any:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        request = urllib.request.Request(self.url + path)
        if self.api_key is not None:
            request.add_header("Authorization", f"Bearer {self.api_key}")
        return opener.open(request, timeout=timeout)


def own_server(settings: ServeSettings) -> OwnServer:
    """Return how a server with these settings is reached from this machine."""
    host = _ANY_ADDRESS.get(settings.host, settings.host)
    if ":" in host:
        host = f"[{host}]"
    scheme = "http" if settings.ssl_certfile is None else "https"
    key = settings.api_key or os.environ.get(KEY_VARIABLE) or None
    return OwnServer(f"{scheme}://{host}:{settings.port}", key)
