"""Which interpreter serves, and what it has."""

import subprocess
import sys

import pytest

from checkpoint.faults import BadInput
from serve import environment
from serve.environment import (
    CPU,
    VARIABLE,
    Device,
    Gpu,
    cuda_device,
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


def test_an_interpreter_that_does_not_run_is_a_fault(interpreter):
    interpreter("echo broken >&2\nexit 3")
    with pytest.raises(BadInput, match="does not run: broken"):
        find_environment()
    interpreter("exit 3")
    with pytest.raises(BadInput, match="does not run: exit status 3"):
        find_environment()


def test_then_the_current_interpreter_then_the_one_beside_the_rooms(monkeypatch, tmp_path):
    beside = tmp_path / ".venv-serve" / "bin" / "python"
    beside.parent.mkdir(parents=True)
    beside.touch()
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    monkeypatch.setattr(environment, "installed_version", lambda *names: "0.32.0")
    assert str(find_python()) == sys.executable
    monkeypatch.setattr(environment, "installed_version", lambda *names: None)
    assert find_python() == beside


def test_where_vllm_is_not_found_the_fault_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(environment, "installed_version", lambda *names: None)
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    with pytest.raises(BadInput, match=f"hybridquant setup-serve.*{VARIABLE}=PYTHON"):
        find_python()
    (tmp_path / "Makefile").touch()
    with pytest.raises(BadInput, match=rf"\.venv-serve.*make setup.*{VARIABLE}"):
        find_python()


def test_the_environment_that_serves_is_set_up():
    found = find_environment()
    assert found.vllm >= (0, 32, 0)
    assert found.plugin is not None
    # Without the .pth this import dies on a CPU: "operator torchvision::nms does not exist".
    code = "import torchvision.transforms; import importlib.metadata as m; print(m.version('vllm'))"
    done = subprocess.run([found.python, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


MIB = 2**20
B200 = Gpu((10, 0), "B200", 183359 * MIB, 182000 * MIB)
H100 = Gpu((9, 0), "H100", 81559 * MIB, 81079 * MIB)
BOTH = [
    ["GPU-b2", "10.0", "183359", "182000", "B200"],
    ["GPU-a1", "9.0", "81559", "81079", "H100"],
]


@pytest.fixture(autouse=True)
def every_gpu_is_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("is_cpu_build", "gpus", "device"),
    [
        (True, [], CPU),
        (False, [], Device("none", "no GPU")),
        (False, BOTH[1:], cuda_device([H100])),
        # With several kinds of GPU, the weakest decides.
        (False, BOTH, Device("cuda", "H100", (9, 0), 2, (B200, H100))),
    ],
)
def test_the_device_is_what_the_interpreter_finds(probed, is_cpu_build, gpus, device):
    python = probed(is_cpu_build=is_cpu_build, gpus=gpus)
    assert find_environment() == environment.ServeEnvironment(python, (0, 33, 0), device, "0.2.1")


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        ("0", [B200]),
        ("1", [H100]),
        ("1,0", [H100, B200]),
        (" 1 , 0 ", [H100, B200]),
        ("GPU-a", [H100]),
        ("GPU-a1,GPU-b2", [H100, B200]),
        ("0,7,1", [B200]),  # the first that names no GPU ends the list
        ("-1", []),
        ("", []),
        ("GPU-", []),  # of several
        ("MIG-of-the-first", [B200._replace(memory=0, free=0)]),
    ],
)
def test_only_visible_gpus_count(probed, monkeypatch, visible, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    probed(is_cpu_build=False, gpus=BOTH)
    device = find_environment().device
    assert list(device.gpus) == gpus
    assert device.kind == ("cuda" if gpus else "none")


def test_only_the_gpus_of_the_ranks_decide_what_can_run():
    both = cuda_device([B200, H100])
    assert both.capability == (9, 0)
    assert both.first(1).capability == (10, 0)
    assert both.first(2) == both.first(8) == both


def test_versions_and_capabilities_are_read():
    assert parse_version("0.26.0rc1+cu130") == (0, 26, 0)
    assert parse_version("0.33") == (0, 33, 0)
    assert parse_capability("12.1") == (12, 1)
