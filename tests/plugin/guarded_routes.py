"""Runs in the serve environment, with the plug-in's sources: which routes of vLLM want a key.

    python tests/plugin/guarded_routes.py MIDDLEWARE

Prints the status of every route to a request without a key, of a server with a key: with the
middleware and without it. There is no engine behind it, so routes that answer fail.
"""

import asyncio
import json
import sys
from typing import Any

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.app import build_app
from vllm.utils.argparse_utils import FlexibleArgumentParser


def statuses(flags: list[str]) -> dict[str, int]:
    """Return the status of each path to a request of its first method without a key."""
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    app = build_app(parser.parse_args(["serve", "DIR", "--api-key", "secret", *flags]))
    described = app.openapi()["paths"]
    found = {}
    for path in [*described, "/docs", "/openapi.json", "/metrics"]:
        method = next(iter(described.get(path, {"get": None})))
        found[path] = asyncio.run(status_of(app, method.upper(), path))
    return found


async def status_of(app: Any, method: str, path: str) -> int:
    """Return the status of the answer to a request without content; 500 where it fails."""
    seen = [500]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            seen[0] = message["status"]

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "scheme": "http",
        "server": ("127.0.0.1", 80),
        "http_version": "1.1",
    }
    try:
        await app(scope, receive, send)
    except Exception:  # there is no engine behind it
        return seen[0]
    return seen[0]


if __name__ == "__main__":
    answers = {"guarded": statuses(["--middleware", sys.argv[1]]), "stock": statuses([])}
    print(json.dumps(answers))
