"""What torch's allocator of GPU memory is told."""

import os

import pytest

from checkpoint.memory import let_segments_grow


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    """Neither variable is set, and what the test sets does not stay."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_segments_grow():
    let_segments_grow()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_what_the_user_configures_stays(monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:512")
    let_segments_grow()
    given = {key: value for key, value in os.environ.items() if key.endswith("_ALLOC_CONF")}
    assert given == {name: "max_split_size_mb:512"}
