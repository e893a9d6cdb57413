import pytest

from checkpoint.native import load_model, load_tokenizer
from tiny.checkpoint import write_tiny


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tokenizer(config):
    return load_tokenizer(config)


@pytest.fixture(scope="session")
def model(config):
    return load_model(config)
