"""Environment variables of the plug-in that turn something on or off."""

import pytest

from hybridquant_vllm.switches import is_on

NAME = "HYBRIDQUANT_FAST_VIDEO"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", True), ("true", True), ("On", True), ("0", False), ("False", False), (" no ", False)],
)
def test_usual_words_turn_on_and_off(monkeypatch, text, expected):
    monkeypatch.setenv(NAME, text)
    assert is_on(NAME, default=not expected) is expected


@pytest.mark.parametrize("default", [True, False])
def test_other_words_are_named_and_change_nothing(monkeypatch, caplog, default):
    monkeypatch.setenv(NAME, "2")
    assert is_on(NAME, default) is default
    assert f"{NAME}=2 is neither 1 nor 0" in caplog.text
    monkeypatch.setenv(NAME, "")
    assert is_on(NAME, default) is default
