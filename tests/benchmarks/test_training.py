"""Distillation is measured by what its own command prints."""

import sys

import pytest

from benchmarks import training
from checkpoint.faults import BadInput

LAST = "step 4 of 4: held-out KL 0.04120 nats, step's 0.05130, 1,234 tokens/s, GPU memory at most 71.5 GB"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("step 0 of 4: held-out KL 0.09791 nats", {"step": 0, "held_out": 0.09791}),
        (LAST, {"step": 4, "held_out": 0.0412, "loss": 0.0513, "rate": 1234, "memory": 71.5}),
        ("4 samples of about 414 tokens", None),
    ],
)
def test_a_progress_line_is_read(line, found):
    assert training.parsed(line) == found


def test_a_run_is_ended_after_its_last_evaluation():
    said = f"import time; print({LAST!r}, flush=True); time.sleep(600)"
    found = training.measure(["-c", said], 4, 1)
    assert found["progress"][0].keys() == {"step", "held_out", "loss", "rate", "memory", "seconds"}


def test_a_run_that_ends_before_says_why():
    with pytest.raises(BadInput, match="memory of cuda: needs 205 GB"):
        training.measure(["-c", "print('memory of cuda: needs 205 GB')"], 4, 1)


def test_more_processes_than_gpus_are_refused(monkeypatch, tmp_path):
    given = ["x", str(tmp_path), "--work", str(tmp_path), "--json", "j", "--processes", "99"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(BadInput, match="99 are asked for"):
        training._run()
