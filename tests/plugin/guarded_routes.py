"""Runs in the serve environment, with the plug-in's sources: which routes of vLLM want a key.

    python tests/plugin/guarded_routes.py MIDDLEWARE

Prints the status of every route to a request without a key, of a server with a key: with the
middleware and without it. There is no engine behind it, so routes that answer fail.
"""

import json
import sys

from fastapi.testclient import TestClient
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.app import build_app
from vllm.utils.argparse_utils import FlexibleArgumentParser


def statuses(flags: list[str]) -> dict[str, int]:
    """Return the status of each path to a request that every method of it would refuse."""
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    app = build_app(parser.parse_args(["serve", "DIR", "--api-key", "secret", *flags]))
    client = TestClient(app, raise_server_exceptions=False)
    found = {}
    for path in [*app.openapi()["paths"], "/docs", "/openapi.json", "/metrics"]:
        method = next(iter(app.openapi()["paths"].get(path, {"get": None})))
        found[path] = client.request(method, path, content=b"{").status_code
    return found


if __name__ == "__main__":
    answers = {"guarded": statuses(["--middleware", sys.argv[1]]), "stock": statuses([])}
    print(json.dumps(answers))
