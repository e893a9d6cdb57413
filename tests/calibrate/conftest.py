import pytest


@pytest.fixture(scope="session")
def config(tiny_config):
    return tiny_config


@pytest.fixture(scope="session")
def tokenizer(tiny_checkpoint):
    return tiny_checkpoint.tokenizer


@pytest.fixture(scope="session")
def model(tiny_checkpoint):
    """The tiny checkpoint's model; do not change it."""
    from checkpoint.native import load_model

    return load_model(tiny_checkpoint)
