"""Several processes of one run: alone nothing happens, under torchrun two agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoint
from checkpoint.processes import ALONE, joined_processes, launched_processes, local_gpu

ROOT = Path(checkpoint.__file__).parents[1]

SHARE = """
import json, sys, time
from pathlib import Path
import torch.distributed as dist
from checkpoint.processes import joined_processes

out = Path(sys.argv[1])
with joined_processes("cpu") as processes:
    if processes.is_first:
        time.sleep(1)  # the other one must wait for this file
        (out / "first").write_text("")
    processes.wait()
    seen = {
        "index": processes.index,
        "count": processes.count,
        "first_was_waited_for": (out / "first").exists(),
        "true_of_first": processes.from_first(processes.is_first),
        "false_of_first": processes.from_first(not processes.is_first),
        "backend": dist.get_backend(),
    }
seen["left"] = not dist.is_initialized()
(out / f"{processes.index}.json").write_text(json.dumps(seen))
"""


FAULTY = """
from checkpoint.faults import BadInput, Fault, main
from checkpoint.processes import joined_processes

def run():
    with joined_processes("cpu") as processes:
        processes.wait()
        if not processes.is_first:
            raise BadInput(Fault("its sample", "is bad"))
        processes.wait()
    return 0

main(run)
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_a_process_is_alone_and_joins_nothing():
    import torch.distributed as dist

    with joined_processes("cpu") as processes:
        assert processes is ALONE
        assert not dist.is_initialized()
    assert launched_processes() == 1
    assert local_gpu() is None


def test_alone_everything_is_that_of_the_first():
    assert ALONE.is_first
    ALONE.wait()
    assert ALONE.from_first(True) is True
    assert ALONE.from_first(False) is False


def test_the_launchers_numbers_are_read(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert launched_processes() == 8
    assert local_gpu() == 3


def launch_two(tmp_path, text):
    """Run a script in two processes of torchrun."""
    script = tmp_path / "script.py"
    script.write_text(text)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [sys.executable, *launcher, script, tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_bad_input_of_one_process_is_a_sentence_and_no_traceback_of_the_other(tmp_path):
    done = launch_two(tmp_path, FAULTY)
    assert done.returncode == 1  # torchrun's own
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "error: its sample: is bad" in lines
    assert "[rank0]" not in done.stderr
    assert "script.py" not in done.stderr.partition("torch/distributed/run.py")[0]


def test_two_processes_under_torchrun_wait_for_each_other_and_agree(tmp_path):
    done = launch_two(tmp_path, SHARE)
    assert done.returncode == 0, done.stderr[-3000:]
    for index in range(2):
        assert json.loads((tmp_path / f"{index}.json").read_text()) == {
            "index": index,
            "count": 2,
            "first_was_waited_for": True,
            "true_of_first": True,
            "false_of_first": False,
            "backend": "gloo",
            "left": True,
        }
