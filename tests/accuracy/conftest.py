"""Fixtures of the suites: a small ChartQA, and servers that die when a test says so."""

import shlex
import sys
from pathlib import Path

import pytest
from suite_data import CHART_ANSWERS, write_chartqa

from accuracy.suites import gate, run, serving
from serve.environment import CPU, ServeEnvironment

HERE = Path(__file__).parent


@pytest.fixture
def folder(tmp_path) -> Path:
    write_chartqa(tmp_path, CHART_ANSWERS)
    return tmp_path


@pytest.fixture
def dying(tmp_path, monkeypatch):
    """Serves with the stub: call it with how many requests each start answers."""
    script = tmp_path / "python"
    stub = HERE / "stub_chat_server.py"
    script.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(stub))} "$@"\n'
    )
    script.chmod(0o755)
    asked = tmp_path / "asked"
    asked.touch()
    monkeypatch.setenv("STUB_LIVES", str(tmp_path / "lives"))
    monkeypatch.setenv("STUB_ASKED", str(asked))
    environment = ServeEnvironment(script, (0, 32, 0), CPU, "0.2.0")
    for module in (serving, run, gate):
        monkeypatch.setattr(module, "find_environment", lambda: environment)

    def dies_after(*answers: int) -> Path:
        (tmp_path / "lives").write_text("\n".join(map(str, answers)))
        return asked

    return dies_after
