import subprocess
import sys

import pytest

from checkpoint.faults import BadInput
from serve import environment
from serve.environment import (
    VARIABLE,
    find_environment,
    find_python,
    parse_capability,
    parse_version,
)


def test_the_variable_goes_first(monkeypatch):
    monkeypatch.setenv(VARIABLE, sys.executable)
    assert str(find_python()) == sys.executable
    with pytest.raises(BadInput, match="has no vllm"):
        find_environment()


def test_a_variable_that_names_no_interpreter_is_a_fault(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "python"))
    with pytest.raises(BadInput, match=VARIABLE):
        find_python()


def test_an_interpreter_that_does_not_run_is_a_fault(monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(broken))
    with pytest.raises(BadInput, match="does not run: broken"):
        find_environment()


def test_then_the_current_interpreter_then_the_one_beside(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(environment, "installed_version", lambda *names: "0.32.0")
    assert str(find_python()) == sys.executable
    monkeypatch.setattr(environment, "installed_version", lambda *names: None)
    assert find_python() == environment.REPOSITORY / ".venv-serve" / "bin" / "python"
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    with pytest.raises(BadInput, match="make setup"):
        find_python()


def test_the_serve_environment_is_mended():
    found = find_environment()
    assert found.vllm >= (0, 32, 0)
    assert found.plugin is not None
    # Without the .pth this import dies on a CPU: "operator torchvision::nms does not exist".
    code = "import torchvision.transforms; import importlib.metadata as m; print(m.version('vllm'))"
    done = subprocess.run([found.python, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_versions_and_capabilities_are_read():
    assert parse_version("0.26.0rc1+cu130") == (0, 26, 0)
    assert parse_version("0.33") == (0, 33, 0)
    assert parse_capability("12.1") == (12, 1)
