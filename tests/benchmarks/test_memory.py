"""The memory peak is the kernel's figure for the command itself; a failure is not a result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks

ROOT = Path(benchmarks.__file__).parents[1]


def run(path, *command):
    # A process of its own: a child's first peak is its parent's, and this process has torch.
    line = [sys.executable, "-m", "benchmarks.memory", "--json", str(path), "--", *command]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(("size", "least", "most"), [(1, 0.0, 0.15), (300_000_000, 0.3, 0.45)])
def test_the_peak_is_the_commands_own(tmp_path, size, least, most):
    path = tmp_path / "result.json"
    run(path, "timeit", "-n", "1", "-r", "1", "-s", f"b'x' * {size}", "'x=/etc/ok'")
    found = json.loads(path.read_text())
    assert least < found["peak_resident_gb"] < most
    assert "=ok" in found["command"], "the file must not contain folders of this machine"


@pytest.mark.parametrize("fails", ["1/0", "import sys; print('other'); sys.exit(1)"])
def test_a_command_that_fails_leaves_no_file(tmp_path, fails):
    path = tmp_path / "result.json"
    done = run(path, "timeit", "-n", "1", "-s", fails)
    assert done.returncode == 2
    assert "ended with exit status 1" in done.stderr
    assert not path.exists()


def test_a_missed_gate_is_a_result_and_is_named(tmp_path):
    path = tmp_path / "result.json"
    run(path, "timeit", "-s", "import sys; print('gate missed: top-1'); sys.exit(1)")
    assert json.loads(path.read_text())["gate"] == "gate missed: top-1"
