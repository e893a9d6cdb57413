"""The share that is won back, its interval, and a comparison that is resumed."""

import numpy as np
import pytest

from benchmarks import tiny_fresh
from benchmarks.parts import Parts
from benchmarks.tiny_fresh import Asked, compared, won_back
from checkpoint.faults import BadInput
from tiny.tasks import items


def marks(right, count):
    return np.array([1.0] * right + [0.0] * (count - right))


def test_the_share_is_that_of_the_loss_and_its_interval_is_around_it():
    reference = {"text": marks(990, 1000)}
    share = won_back(reference, {"text": marks(860, 1000)}, {"text": marks(960, 1000)})
    assert share.share == pytest.approx(100 / 130)
    assert 0.6 < share.low < share.share < share.high < 0.9


def test_fewer_items_have_a_wider_interval():
    few = won_back({"text": marks(99, 100)}, {"text": marks(86, 100)}, {"text": marks(96, 100)})
    many = won_back(
        {"text": marks(990, 1000)}, {"text": marks(860, 1000)}, {"text": marks(960, 1000)}
    )
    assert few.high - few.low > 2 * (many.high - many.low)


def test_nothing_lost_has_no_share():
    assert won_back({"text": marks(9, 9)}, {"text": marks(9, 9)}, {"text": marks(8, 9)}) is None


def test_forms_are_compared_on_the_items_that_all_have_answered():
    found = compared(
        {
            "bf16": {"text": marks(8, 8), "chart": marks(4, 4)},
            "nvfp4": {"text": marks(4, 8), "chart": marks(2, 4)},
            "qad": {"text": marks(6, 6)},
            "qad, served": {"text": marks(3, 4)},
            "bf16, served": {"text": marks(4, 4)},
            "nvfp4, served": {"text": marks(2, 4)},
        }
    )
    assert found["qad"]["items"] == {"text": 6}
    assert found["qad"]["won_back"]["text"]["share"] == 1.0
    assert found["nvfp4"]["points"] == -50.0
    assert "won_back" not in found["nvfp4"]
    assert found["qad, served"]["won_back"]["mean"]["share"] == 0.5


def test_a_comparison_that_was_stopped_is_resumed_with_the_answers_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_fresh, "_PART", 2)
    samples = {"text": items("text", "calibration", 3, 12)}
    calls = []

    def answer(given):
        calls.append(len(given))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [sample.answer for sample in given]

    def ask():
        asked = Asked(samples, Parts(tmp_path / "parts.json", {}))
        for task, start in tiny_fresh._starts(samples):
            asked.ask("bf16", task, start, answer)
        return asked.marks

    with pytest.raises(KeyboardInterrupt):
        ask()
    assert ask()["bf16"]["text"].tolist() == [1, 1, 1]
    assert calls == [2, 1, 1]


def test_bad_items_and_series_are_named():
    with pytest.raises(BadInput, match="unknown task 'txt'"):
        tiny_fresh._counts("txt=3")
    with pytest.raises(BadInput, match="text=x is no number"):
        tiny_fresh._counts("text=x")
    with pytest.raises(BadInput, match="'nvfp4' is not NAME=VALUE"):
        tiny_fresh._pairs("nvfp4", "--forms")
