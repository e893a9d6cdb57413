"""Connects to an OpenAI-compatible server: address, key, proxy, and what it serves."""

from __future__ import annotations

import ipaddress
import os
import sys
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from checkpoint.command import command_name
from checkpoint.faults import BadInput, Fault, shortened

if TYPE_CHECKING:
    from openai import OpenAI

KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable that vLLM reads its key from; clients read the same one."""


def connect(
    url: str,
    api_key: str | None = None,
    timeout: float = 600.0,
    max_retries: int = 0,
    is_own: bool = False,
) -> OpenAI:
    """Return a client for the server at a URL. Nothing is sent yet.

    A server on this machine is asked directly, whatever proxy the environment names.

    Args:
        url: With or without `/v1`, such as `http://localhost:8000` or `https://[::1]:8443/v1`.
        api_key: The server's key; from VLLM_API_KEY when None.
        timeout: Seconds for one request.
        max_retries: How often a request that failed is repeated.
        is_own: Whether this process has started the server: its certificate is not checked then.

    Raises:
        BadInput: The URL is not one, or the openai package is missing.
    """
    host = _host_of(url)
    try:
        from openai import DefaultHttpxClient, OpenAI
    except ImportError:
        remedy = f"{sys.executable} -m pip install openai"
        raise BadInput(Fault("openai", "is not installed here", remedy)) from None
    root = url.rstrip("/")
    if not root.endswith("/v1"):
        root += "/v1"
    key = api_key or os.environ.get(KEY_VARIABLE) or "none"
    if not key.isascii() or not key.isprintable():
        what = "contains characters that an HTTP header cannot carry"
        raise BadInput(Fault("the API key", what, "copy it again"))
    asks_directly = is_own or is_loopback(host)
    http_client = DefaultHttpxClient(trust_env=not asks_directly, verify=not is_own)
    return OpenAI(
        base_url=root,
        api_key=key,
        timeout=timeout,
        max_retries=max_retries,
        http_client=http_client,
    )


def _host_of(url: str) -> str:
    remedy = "write it as http://localhost:8000"
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port  # raises ValueError if it is not a port
    except ValueError as error:
        raise BadInput(Fault(shortened(url), f"is not a URL: {shortened(error)}", remedy)) from None
    if parts.scheme not in ("http", "https") or not host:
        raise BadInput(Fault(shortened(url), "is not an http or https URL with a host", remedy))
    if parts.username is not None or parts.password is not None:
        # The error does not repeat them, nor would the client send them: it sends the key.
        what = "is given with a user name or a password"
        raise BadInput(Fault(host, what, f"leave it out, and give a key by {KEY_VARIABLE}"))
    return host


def is_url(target: str) -> bool:
    """Return whether a target is the URL of a running server and not a directory."""
    return target.lower().startswith(("http://", "https://"))


def is_loopback(host: str) -> bool:
    """Return whether a host name or address means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def first_model(client: OpenAI) -> str:
    """Return the name of the model that a server lists first.

    Raises:
        BadInput: No server answers there, it wants another key, it is not an OpenAI-compatible
            server, or it serves no model.
    """
    from openai import AuthenticationError, OpenAIError, PermissionDeniedError

    where = shortened(client.base_url)
    try:
        models = client.models.list().data
        names = [model.id for model in models]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a model without a name")
    except (AuthenticationError, PermissionDeniedError):
        remedy = f"give --api-key, or set {KEY_VARIABLE}"
        raise BadInput(Fault(where, "refuses the API key", remedy)) from None
    except OpenAIError as error:
        what = f"no server answers: {shortened(error)}"
        raise BadInput(Fault(where, what, f"start one: {command_name('serve')} DIR")) from None
    except (ValueError, AttributeError, TypeError):
        what = "does not answer as an OpenAI-compatible server: a web page, or another program"
        raise BadInput(Fault(where, what, "check host and port")) from None
    if not names:
        raise BadInput(Fault(where, "serves no model", "look at its log"))
    return names[0]
