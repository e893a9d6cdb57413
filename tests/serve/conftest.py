"""Fixtures of the tests of serve."""

import logging

import pytest

from checkpoint.log import NAMESPACE
from serve.bench_runs import bench_client
from serve.environment import find_environment


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
