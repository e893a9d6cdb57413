"""The estimate of a suite's duration, worked out by hand."""

import pytest

from accuracy.suites.catalogue import REPORT
from benchmarks.suite_duration import CLIPS, ITEMS, PAGES, estimate
from checkpoint.video import Video


def test_items_are_divided_by_the_measured_rates():
    """5 pages and 1 clip of 64 frames per second; a clip of 128 frames takes twice as long."""
    rates = {PAGES: {"plugin": [4.0, 6.0]}, CLIPS: {"plugin": [1.0]}}
    measured = {load: {"requests per second": rate} for load, rate in rates.items()}
    found = estimate({"measured": measured}, Video(fps=2, max_frames=128))
    minutes = {row["task"]: row["minutes"] for row in found["measured"]}
    assert minutes["chartqa"] == pytest.approx(2500 / 5 / 60, abs=0.05)
    assert minutes["video_mme"] == pytest.approx(2700 / 0.5 / 60, abs=0.05)
    assert found["hours_per_directory"] == pytest.approx(sum(minutes.values()) / 60, abs=0.05)


def test_every_benchmark_has_its_number_of_items():
    assert ITEMS.keys() == {task.name for task in REPORT}
