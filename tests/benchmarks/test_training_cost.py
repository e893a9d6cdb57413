"""Distillation is measured by what its own command prints."""

import sys
import time
from pathlib import Path

import pytest

from benchmarks import training
from benchmarks.processes import visible
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


LAUNCHER = f"""
import subprocess, sys, signal, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
def end(*_):
    worker.kill(); worker.wait(); sys.exit(1)
signal.signal(signal.SIGTERM, end)
print("worker", worker.pid, flush=True)
print({LAST!r}, flush=True)
time.sleep(600)
"""


def test_a_run_is_ended_after_its_last_evaluation_with_what_it_launched(capsys):
    start = time.monotonic()
    found = training.measure(["-c", LAUNCHER], 4, 1)
    assert found["progress"][0].keys() == {"step", "held_out", "loss", "rate", "memory", "seconds"}
    assert time.monotonic() - start < 30
    worker = capsys.readouterr().out.partition("worker ")[2].split()[0]
    stat = Path(f"/proc/{worker}/stat")
    assert not stat.exists()


def test_the_gpus_that_a_user_left_visible_are_taken(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert visible(2) == "4,5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible(2) == "0,1"


def test_a_run_that_ends_before_says_why():
    with pytest.raises(BadInput, match="memory of cuda: needs 205 GB"):
        training.measure(["-c", "print('memory of cuda: needs 205 GB')"], 4, 1)


def test_fields_may_follow_options_and_more_processes_than_gpus_are_refused(monkeypatch, tmp_path):
    # argparse gives a `*` positional its words together with the model, and then refuses those
    # after the options.
    given = [
        "x",
        str(tmp_path),
        "--work",
        str(tmp_path),
        "--json",
        "j",
        "--processes",
        "99",
        "distill.batch=4",
    ]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(BadInput, match="99 are asked for"):
        training._run()
