"""Two processes share a model with FSDP2 (gloo, on the CPU): killed, taken up again, one export
like one process's.

NCCL, mixed precision and memory need GPUs; what is run there stands in benchmarks/.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from export.manifest import read_manifest
from export.verify import verify
from tests.quantize.distill.distilling import one_thread  # noqa: F401
from tests.quantize.distill.test_distill_resume import RECIPE, load_and_run, overrides

SHARDED = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "NemotronHBlock",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "OMP_NUM_THREADS": "1",
}
STEPS = "distill.steps=3"


def launch(tiny, output, log) -> subprocess.Popen:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command = [
        *torchrun,
        "-m",
        "tests.quantize.distill.sharded_on_cpu",
        str(RECIPE),
        *overrides(tiny, output, STEPS),
    ]
    return subprocess.Popen(
        command, env=os.environ | SHARDED, stderr=log, stdout=log, start_new_session=True
    )


def test_a_sharded_run_killed_and_taken_up_again_exports_what_one_process_does(tiny, tmp_path):
    output, state, log = tmp_path / "two", tmp_path / ".two.qad", tmp_path / "log"
    with log.open("w") as file:
        process = launch(tiny, output, file)
        while not (state / "checkpoint-2").exists():
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        workers = [
            line for line in os.listdir("/proc") if line.isdigit() and str(output) in cmdline(line)
        ]
        for worker in workers:  # torchrun starts each in a session of its own
            os.kill(int(worker), signal.SIGKILL)
        sharded = list((state / "checkpoint-2").glob("pytorch_model_fsdp_0*")) + list(
            state.glob("*/optimizer_0")
        )
        assert sharded, "the model was not sharded"
        assert launch(tiny, output, file).wait(timeout=300) in (0, 1), log.read_text()
    load_and_run(tiny, tmp_path / "one", STEPS)
    assert_same_but_for_rounding(output, tmp_path / "one")
    assert verify(output, tiny) == []
    two, one = (read_manifest(directory).distillation for directory in (output, tmp_path / "one"))
    assert dict(two["losses"]) == pytest.approx(dict(one["losses"]), rel=1e-5)
    assert dict(two["held_out"]) == pytest.approx(dict(one["held_out"]), rel=1e-5)
    assert not state.exists()


def assert_same_but_for_rounding(directory, other):
    """Two processes add up gradients in another order, which moves a weight or two over the edge of
    an FP8 step.
    """
    ours, theirs = (load_file(each / "model.safetensors") for each in (directory, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        if tensor.dtype == torch.float8_e4m3fn:
            apart = (tensor.float() - theirs[name].float()).abs()
            assert (apart > 0).float().mean() < 1e-4, name
            assert (apart <= tensor.float().abs() / 8 + 2**-9).all(), (
                name
            )  # one step: three bits of mantissa
        else:
            assert torch.equal(tensor, theirs[name]), name


def cmdline(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:
        return ""
