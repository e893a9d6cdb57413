"""Distillation is measured by the lines that its own command logs."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import training
from benchmarks.processes import visible
from checkpoint.faults import BadInput

LAST = "step 4 of 4: held-out KL 0.04120 nats, step's 0.05130, 1,234 tokens/s, GPU memory at most 71.5 GB"  # noqa: E501


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
    assert training.parsed_step(line) is None


STEPS = (
    "step 1 of 4: KL 0.06130 nats, 40.2 s, 1,630 tokens/s",
    "step 2 of 4: KL 0.05530 nats, 16.0 s, 4,096 tokens/s",
    "step 3 of 4: KL 0.05230 nats, 16.4 s, 3,996 tokens/s",
    "step 4 of 4: KL 0.05130 nats, 16.1 s, 4,070 tokens/s",
)


def test_the_line_of_a_step_is_read():
    found = {"step": 1, "loss": 0.0613, "seconds": 40.2, "rate": 1630}
    assert training.parsed_step(STEPS[0]) == found
    assert training.parsed(STEPS[0]) is None


LAUNCHER = f"""
import subprocess, sys, signal, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
worker = subprocess.Popen(sleep, start_new_session=True)
def end(*_):
    worker.kill(); worker.wait(); sys.exit(1)
signal.signal(signal.SIGTERM, end)
print("worker", worker.pid, flush=True)
print("8 samples of about 414 tokens", flush=True)
print("then 4 steps: about 2 h, 65.0 GB a process at the peak, as estimated", flush=True)
print({chr(10).join(STEPS)!r}, flush=True)
print({LAST!r}, flush=True)
time.sleep(600)
"""


def test_a_run_and_its_workers_are_ended_after_the_last_evaluation(capsys):
    start = time.monotonic()
    found = training.measure(["-c", LAUNCHER], 4, 1)
    assert time.monotonic() - start < 30
    assert found["plan"][0] == "8 samples of about 414 tokens"
    # Without the first step, which compiles kernels.
    assert found["tokens_per_second"] == 4070
    assert found["first_step_seconds"] == 40.2
    assert [step["step"] for step in found["steps"]] == [1, 2, 3, 4]
    assert (found["planned_gb"], found["peak_gb"], found["peak_of_planned"]) == (65.0, 71.5, 1.1)
    assert found["progress"][0].keys() == {"step", "held_out", "loss", "rate", "memory", "seconds"}
    worker = capsys.readouterr().out.partition("worker ")[2].split()[0]
    assert not Path(f"/proc/{worker}/stat").exists()


def test_the_gpus_that_a_user_left_visible_are_taken(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert visible(2) == "4,5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible(2) == "0,1"


def test_a_run_that_ends_early_is_reported_with_its_output():
    with pytest.raises(BadInput, match="memory of cuda: needs 205 GB"):
        training.measure(["-c", "print('memory of cuda: needs 205 GB')"], 4, 1)


def test_fields_may_follow_options_and_more_processes_than_gpus_are_refused(monkeypatch, tmp_path):
    given = ["x", str(tmp_path), "--work", str(tmp_path), "--json", "j"]
    monkeypatch.setattr(sys, "argv", [*given, "--processes", "99", "distill.batch=4"])
    with pytest.raises(BadInput, match="99 are too many"):
        training._run()


def test_one_process_runs_without_a_launcher_and_several_with_fsdp2(tmp_path):
    parser = training._parser()
    given = ["MODEL", "--work", str(tmp_path), "--json", "j"]
    one = training._command(parser.parse_args(given), tmp_path / "qad")
    assert one[:2] == ["-m", "quantize.qad"]
    assert Path(one[2]).name == "nvfp4_qad.yaml"
    two = training._command(parser.parse_args([*given, "--processes", "2"]), tmp_path / "qad")
    assert two[:4] == ["-m", "accelerate.commands.launch", "--num_processes", "2"]
    assert "--use_fsdp" in two
    assert "distill.held_out=4" in two


def test_the_measured_command_is_one_that_quantize_qad_takes(tmp_path):
    given = [str(tmp_path / "none"), "--work", str(tmp_path), "--json", "j", "distill.batch=4"]
    options = training._parser().parse_intermixed_args(given)
    command = training._command(options, tmp_path / "qad")
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert result.returncode == 2
    # It has got as far as the model that is missing.
    assert str(tmp_path / "none") in result.stderr
    assert "usage:" not in result.stderr
