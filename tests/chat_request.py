"""One request to a running server, with a body that a client of OpenAI's would not send."""

import json
import urllib.error
import urllib.request


def post_chat(server, **fields):
    """Ask for a chat completion, and return (status, body)."""
    body = json.dumps({"model": server.model, **fields}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/chat/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
