"""The most memory that a command had resident is the kernel's figure of that command."""

import json
import sys

import pytest

from benchmarks import memory
from checkpoint.faults import BadInput


def measured(monkeypatch, path, *command):
    monkeypatch.setattr(sys, "argv", ["x", "--json", str(path), "--", *command])
    memory._run()
    return json.loads(path.read_text())


def test_a_commands_time_and_peak_are_written_and_no_folder_of_this_machine(monkeypatch, tmp_path):
    found = measured(
        monkeypatch, tmp_path / "j", "timeit", "-n", "1", "-r", "1", "-s", "b'x' * 300_000_000", "'x=/etc/ok'"
    )
    assert found["peak_resident_gb"] > 0.3
    assert found["seconds"] > 0
    assert "=ok" in found["command"]


def test_a_command_that_fails_leaves_no_file(monkeypatch, tmp_path):
    with pytest.raises(BadInput, match=r"quantize\.fp8 nowhere.*exit status 2"):
        measured(monkeypatch, tmp_path / "j", "quantize.fp8", "nowhere.yaml")
    assert not (tmp_path / "j").exists()
