"""Requests to a running server, with bodies that a client of OpenAI's would not send."""

import json
import urllib.error
import urllib.request


def post_chat(server, **fields):
    """Ask for a chat completion, and return (status, body)."""
    return post_json(server, "/v1/chat/completions", {"model": server.model, **fields})


def post_json(server, path, value):
    """Send JSON to a path of the server, and return (status, body)."""
    return post_bytes(server, path, json.dumps(value).encode())


def post_bytes(server, path, body):
    """Send a body that is said to be JSON, and return (status, body).

    Raises:
        http.client.IncompleteRead: The server breaks its answer off.
    """
    url = server.url.removesuffix("/v1") + path
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
