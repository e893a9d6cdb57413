"""Dividing the time to the first token into steps."""

import json

import pytest

from benchmarks.video_steps import breakdown, steps_of

ANSWER = {"begin": 100.0, "first": 2.0}
MOMENTS = {
    "decode and resize": (100.1, 100.6),
    "vision": (100.8, 101.3),
    "tower": (100.9, 101.2),
    "language model": (101.4, 101.9),
}


def lines(shift=0.0):
    found = []
    for step, (begin, end) in MOMENTS.items():
        found.append({"step": step, "begin": begin + shift, "end": end + shift})
    return found


def test_the_steps_add_up_to_the_first_token():
    steps = steps_of(ANSWER, lines())
    total = steps.pop("first token")
    assert total == 2.0
    assert sum(steps.values()) == pytest.approx(total)
    assert steps["vision tower"] == pytest.approx(0.3)
    assert steps["EVS, frame texts"] == pytest.approx(0.1)


def test_of_a_step_that_comes_twice_the_first_counts():
    decoding = {"step": "language model", "begin": 101.95, "end": 101.99}
    assert steps_of(ANSWER, [decoding, *lines()]) == steps_of(ANSWER, lines())


def test_a_server_without_the_plugin_is_told_by_the_step_that_is_missing():
    with pytest.raises(KeyError, match="tower"):
        steps_of(ANSWER, [line for line in lines() if line["step"] != "tower"])


def test_the_first_clip_is_not_counted(tmp_path):
    times = tmp_path / "steps.jsonl"

    class Server:
        asked = 0

        def ask(self, kind, files, tokens):
            # The first clip is ten times as slow as the others.
            factor = 10 if self.asked == 0 else 1
            self.asked += 1
            written = []
            for line in lines():
                moved = {key: 100 + (line[key] - 100) * factor for key in ("begin", "end")}
                written.append(json.dumps(line | moved))
            times.write_text("\n".join(written))
            return {"begin": 100.0, "first": 2.0 * factor}

    found = breakdown(Server(), lambda: tmp_path / "clip.mp4", times, 3)
    assert found["first token"] == 2.0
    assert not times.exists()
