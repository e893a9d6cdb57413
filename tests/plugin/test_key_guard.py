"""A server with a key answers nobody without it, at no address that vLLM has."""

import asyncio
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybridquant_vllm.key_guard import KEY_VARIABLE, OPEN_PATHS, KeyGuard
from serve.command import KEY_GUARD
from serve.environment import find_python

SCRIPT = Path(__file__).with_name("guarded_routes.py")
PLUGIN = Path(__file__).parents[2] / "plugin"


def ask(path, authorization=None, keys=("one", "two"), **scope):
    """What is sent for a request: the guard's answer, or `passed` by the application behind it."""
    sent = []

    async def application(scope, receive, send):
        sent.append("passed")

    async def send(message):
        sent.append(message.get("status") or message["type"])

    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    app = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(api_key=list(keys))))
    request = {"type": "http", "method": "POST", "path": path, "headers": headers, "app": app}
    asyncio.run(KeyGuard(application)(request | scope, None, send))
    return sent[0]


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_what_a_monitor_asks_needs_no_key(path):
    assert ask(path) == "passed"
    assert ask(f"/behind{path}", root_path="/behind") == "passed"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/invocations",
        "/tokenize",
        "/",
        "/health/",
        "//health",
        "/HEALTH",
        "/metrics/x",
    ],
)
def test_everything_else_needs_one(path):
    assert ask(path) == 401
    assert ask(path, "Bearer one") == "passed"
    assert ask(path, "bearer two") == "passed"


@pytest.mark.parametrize("given", ["Bearer three", "Bearer", "Bearer ", "one", "Basic one", ""])
def test_another_key_is_none(given):
    assert ask("/v1/models", given) == 401


def test_the_key_of_the_environment_counts_where_the_command_line_gives_none(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "three")
    assert ask("/tokenize", "Bearer three", keys=()) == "passed"
    assert ask("/tokenize", "Bearer three", keys=("one",)) == 401
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert ask("/tokenize", "Bearer ", keys=()) == 401


def test_a_browsers_question_and_the_start_of_the_server_pass():
    assert ask("/v1/models", method="OPTIONS") == "passed"
    assert ask("", type="lifespan") == "passed"
    assert ask("/v1/realtime", type="websocket") == "websocket.close"


@pytest.fixture(scope="module")
def answers():
    """Statuses of all of vLLM's routes without a key, by the middleware that it is given."""
    variables = {"PYTHONPATH": str(PLUGIN), "VLLM_NO_USAGE_STATS": "1"}
    result = subprocess.run(
        [str(find_python()), str(SCRIPT), KEY_GUARD],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_no_route_of_vllm_answers_without_a_key(answers):
    guarded = answers["guarded"]
    assert {"/v1/chat/completions", "/invocations", "/tokenize", "/metrics"} <= set(guarded)
    open_routes = {path for path, status in guarded.items() if status != 401}
    assert open_routes == OPEN_PATHS


def test_upstream_trap_vllms_own_check_leaves_routes_open(answers):
    """If this fails, the guard may go."""
    assert answers["stock"]["/v1/chat/completions"] == 401
    assert answers["stock"]["/invocations"] != 401
