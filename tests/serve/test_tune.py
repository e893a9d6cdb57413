"""Tuning vLLM's state update: the search, the file, who uses it, and bad input."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from commands import run_module

import serve.state_update
from checkpoint.config import read_config
from checkpoint.faults import BadInput
from serve import tune_kernel
from serve.command import build_environment
from serve.environment import CPU, Device, Gpu, ServeEnvironment, cuda_device
from serve.plan import serving_plan
from serve.settings import ServeSettings
from serve.state_update import FOLDER_VARIABLE, file_name, find_tuned, mamba_layer, state_type
from serve.tune import parse_batches, parse_states, run, write_files

H100 = cuda_device([Gpu((9, 0), "NVIDIA H100 80GB HBM3", 85e9, 84e9)])
ON_H100 = ServeEnvironment("python", (0, 33, 0), H100, "0.2.1")
SHAPE = tune_kernel.Shape(heads=4, groups=2, head_dim=8, state_size=16)


class PlainKernel:
    """The kernel in plain PyTorch; configurations of `wrong` rows answer wrongly."""

    is_blackwell = False
    wrong = 128
    broken = 64

    def default(self, shape, batch, state):
        return (4, 4)

    def update(self, problem, launch, number=0):
        if launch[0] == self.broken:
            raise RuntimeError("out of resources")
        states, outputs = problem.expected()
        slots = problem.slots[0][:, 0].long()
        problem.states[slots] = states.to(problem.states.dtype)
        problem.out.copy_(outputs)
        if launch[0] == self.wrong:
            problem.out.mul_(1.1)


class Timed:
    """Times of configurations: 16 rows and 2 warps are fastest."""

    def __init__(self, kernel, problem, launch):
        self.launch = launch

    def microseconds(self):
        rows, warps = self.launch
        return 10.0 + abs(rows - 16) + abs(warps - 2)


@pytest.fixture
def search(monkeypatch):
    """Tunes for one type of the state on the CPU, and returns what is found."""
    monkeypatch.setattr(tune_kernel, "DEVICE", "cpu")
    monkeypatch.setattr(tune_kernel, "Graph", Timed)

    def tune(state="float32", batches=(3, 1), seconds=60.0, free=1e9):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
        request = SHAPE.__dict__ | {"batches": list(batches), "started": 0.0}
        kept = []
        end = tune_kernel.time.monotonic() + seconds
        tune_kernel.tune_state(PlainKernel(), request, state, end, kept.append)
        return kept[-1]

    return tune


@pytest.mark.parametrize("state", ["float32", "float16", "bfloat16"])
def test_the_fastest_right_configuration_is_chosen(search, state):
    found = search(state)
    assert [entry["batch"] for entry in found["batches"]] == [3, 1]
    for entry in found["batches"]:
        assert entry["key"] == entry["batch"] * SHAPE.heads
        assert entry["default"] == {"launch": "4x4", "us": 24.0}
        assert entry["chosen"] == {"launch": "16x2", "us": 10.0}
        assert entry["times_faster"] == 2.4


def test_a_configuration_that_answers_otherwise_or_fails_is_left_out(search):
    found = search()
    assert "answers differ" in found["failed"]["128x2"]
    assert "out of resources" in found["failed"]["64x1"]
    assert all("128x2" not in entry["first_us"] for entry in found["batches"])


def test_what_there_is_no_time_or_memory_for_is_named(search):
    assert search(seconds=-1)["left_out"] == {"3": "no time", "1": "no time"}
    one_state = 2 * 3 * 4 * SHAPE.state_values
    assert search(free=one_state)["left_out"] == {"3": "no memory"}
    assert search(free=10)["left_out"] == {"3": "no memory", "1": "no memory"}


def test_vllms_own_choice_stays_without_a_gain():
    times = {(4, 4): 10.05, (16, 2): 10.0}
    assert tune_kernel.chosen((4, 4), times) == (4, 4)
    assert tune_kernel.chosen((4, 4), times | {(8, 2): 9.0}) == (8, 2)


@pytest.fixture
def found(search):
    """What `measure` returns for heads as the 12B's."""
    entries = [
        {"key": key, "chosen": {"launch": launch}}
        for key, launch in ((8192, "16x2"), (128, "4x1"), (2048, "8x4"))
    ]
    states = {"float32": {"batches": entries, "left_out": {}}}
    return {"states": states, "triton": "3.6.0", "device_name": "NVIDIA_H100_80GB_HBM3"}


def test_the_file_has_a_launch_for_each_batch_times_heads(found, full12b, tmp_path):
    layer = mamba_layer(full12b)
    assert layer == (128, 8, 80, 128)
    (path,) = write_files(found, layer, tmp_path)
    assert path.name == (
        "headdim=80,dstate=128,device_name=NVIDIA_H100_80GB_HBM3,cache_dtype=float32.json"
    )
    content = json.loads(path.read_text(encoding="utf-8"))
    assert list(content) == ["triton_version", "128", "2048", "8192"]
    assert content["2048"] == {"BLOCK_SIZE_M": 8, "num_warps": 4}


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Empty folders in the place of the user's cache and of the shipped files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(serve.state_update, "SHIPPED", shipped)
    monkeypatch.setattr("serve.plan.SHIPPED", shipped)
    return {"own": serve.state_update.own_folder(), "shipped": shipped}


def put(folder, config, state="float32"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file_name(mamba_layer(config), "NVIDIA H100 80GB HBM3", state)).write_text("{}")


def chosen_folder(config, extra=()):
    """The folder that vLLM is told, on an H100."""
    return build_environment(config, ServeSettings(), H100, extra).get(FOLDER_VARIABLE)


def line(config, extra=()):
    choices = serving_plan(config, ServeSettings(), ON_H100, extra)
    lines = {choice.name: str(choice) for choice in choices}
    return lines["state update"], any("44251" in text for text in lines.values())


def test_a_file_of_this_gpu_is_used_and_said_to_be(folders, full12b):
    text, is_known_fault = line(full12b)
    assert "vLLM's own choice, states in float32 (not tuned for this GPU" in text
    assert is_known_fault
    assert chosen_folder(full12b) is None

    put(folders["shipped"], full12b)
    text, is_known_fault = line(full12b)
    assert "tuned, states in float32 (measured for this GPU, and shipped; -- --mamba" in text
    assert not is_known_fault
    assert build_environment(full12b, ServeSettings(), H100)[FOLDER_VARIABLE] == str(
        folders["shipped"]
    )

    put(folders["own"], full12b)
    assert "measured on this machine" in line(full12b)[0]
    assert chosen_folder(full12b) == str(folders["own"])


def test_the_type_of_the_state_chooses_the_file(folders, full12b):
    put(folders["own"], full12b)
    put(folders["shipped"], full12b, "float16")
    extra = ["--mamba-ssm-cache-dtype", "bfloat16"]
    assert state_type(full12b) == "float32"
    assert state_type(full12b, extra) == "bfloat16"
    assert find_tuned(full12b, H100, extra).folder == folders["shipped"]
    assert build_environment(full12b, ServeSettings(), H100, extra)[FOLDER_VARIABLE] == str(
        folders["shipped"]
    )
    assert "states in bfloat16" in line(full12b, extra)[0]


def test_the_users_folder_stays(folders, full12b, monkeypatch, tmp_path):
    put(folders["own"], full12b)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert chosen_folder(full12b) is None
    text, is_known_fault = line(full12b)
    assert f"{tmp_path} has no headdim=80,dstate=128" in text
    assert is_known_fault
    put(tmp_path, full12b)
    assert "given by VLLM_TUNED_CONFIG_FOLDER" in line(full12b)[0]


def test_other_gpus_and_cpus_use_none(folders, full12b):
    put(folders["own"], full12b)
    other = cuda_device([Gpu((9, 0), "NVIDIA H200")])
    assert find_tuned(full12b, other).folder is None
    assert find_tuned(full12b, CPU) is None
    assert FOLDER_VARIABLE not in build_environment(full12b, ServeSettings(), CPU)


def test_shipped_files_are_of_the_released_model(full12b):
    for path in serve.state_update.SHIPPED.glob("*.json"):
        device = path.name.partition("device_name=")[2].partition(",")[0]
        states = ("float32", "float16")
        assert path.name in [file_name(mamba_layer(full12b), device, state) for state in states]
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content.pop("triton_version")
        assert all(int(key) % full12b.text["mamba_num_heads"] == 0 for key in content)


def test_without_a_gpu_there_is_one_sentence(tiny):
    done = run_module("serve.tune", tiny)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "hybridquant tune: needs a GPU, and vLLM 0.3" in done.stderr


def test_bad_input_is_refused_at_once(tmp_path, restored_logging):
    arguments = ["--batch-sizes", "0", "--state", "int8", "--seconds", "nan"]
    with pytest.raises(BadInput) as refused:
        run([str(tmp_path / "none"), *arguments], ON_H100)
    assert len(refused.value.faults) == 4
    with pytest.raises(BadInput, match="one file"):
        parse_states("float16,bfloat16")
    assert parse_batches("8,1,8") == [8, 1]


def test_a_folder_that_cannot_be_written_is_refused_first(tiny, tmp_path, restored_logging):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(BadInput, match="cannot be written"):
            run([str(tiny), "--out", str(out)], ON_H100)
    none = ServeEnvironment("python", (0, 33, 0), Device("none", "no GPU"), None)
    with pytest.raises(BadInput, match="this machine has none"):
        run([str(tiny)], none)


def test_a_kernel_that_cannot_be_timed_ends_with_1(tiny, tmp_path, restored_logging, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho RuntimeError: no kernel image >&2\nexit 3\n")
    python.chmod(0o755)
    out = tmp_path / "out"
    broken = ServeEnvironment(python, (0, 33, 0), H100, "0.2.1")
    assert run([str(tiny), "--out", str(out)], broken) == 1
    assert "ended with status 3: RuntimeError: no kernel image" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_what_runs_in_the_serve_environment_imports_nothing_of_the_project():
    source = Path(tune_kernel.__file__).read_text(encoding="utf-8")
    rooms = [path.parent.name for path in Path(serve.__file__).parents[1].glob("*/__init__.py")]
    assert importlib.util.find_spec("serve.tune_kernel")
    for room in rooms:
        assert f"from {room}" not in source
        assert f"import {room}" not in source


def test_the_tiny_checkpoint_has_a_layer(tiny):
    assert all(size > 0 for size in mamba_layer(read_config(tiny)))
