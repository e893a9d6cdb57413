"""The most memory that a command had resident is the kernel's figure of that command, and a failure
is no result.
"""

import json
import subprocess
import sys

import pytest


def measured(path, *command):
    # A process of its own: a child's first peak is its parent's, and this one has torch.
    line = [sys.executable, "-m", "benchmarks.memory", "--json", str(path), "--", *command]
    done = subprocess.run(line, capture_output=True, text=True)
    return json.loads(path.read_text()) if path.exists() else done


@pytest.mark.parametrize(("size", "least", "most"), [(1, 0.0, 0.15), (300_000_000, 0.3, 0.45)])
def test_the_peak_is_the_commands_own(tmp_path, size, least, most):
    found = measured(
        tmp_path / "j", "timeit", "-n", "1", "-r", "1", "-s", f"b'x' * {size}", "'x=/etc/ok'"
    )
    assert least < found["peak_resident_gb"] < most
    assert "=ok" in found["command"], "no folder of this machine"


@pytest.mark.parametrize("fails", ["1/0", "import sys; print('other'); sys.exit(1)"])
def test_a_command_that_fails_leaves_no_file(tmp_path, fails):
    done = measured(tmp_path / "j", "timeit", "-n", "1", "-s", fails)
    assert done.returncode == 2
    assert "ended with exit status 1" in done.stderr


def test_a_missed_gate_is_a_result_and_is_named(tmp_path):
    found = measured(
        tmp_path / "j", "timeit", "-s", "import sys; print('gate missed: top-1'); sys.exit(1)"
    )
    assert found["gate"] == "gate missed: top-1"
