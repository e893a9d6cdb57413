"""Two processes share a model with FSDP2 (gloo, on the CPU): killed and resumed, they export what
one process does.

NCCL, mixed precision and memory need GPUs; what was run there is in benchmarks/results/.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from checkpoint.files import TensorFiles
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
# Packed rows are filled by each process with its own samples, so one process would have others.
# Four batches, so that each process accumulates two.
SETTINGS = ("distill.steps=3", "distill.pack_length=null", "distill.batch=4")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
WORKER = "tests.quantize.distill.sharded_on_cpu"


def launch(tiny, output, log) -> subprocess.Popen:
    arguments = [str(RECIPE), *overrides(tiny, output, *SETTINGS)]
    command = [sys.executable, "-m", *TORCHRUN, "-m", WORKER, *arguments]
    environment = os.environ | SHARDED
    return subprocess.Popen(
        command, env=environment, stderr=log, stdout=log, start_new_session=True
    )


def kill(process: subprocess.Popen, output) -> None:
    """Kill a launcher and its workers, each of which is in a session of its own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Until the last one is gone it holds the lock of the run's state.
    while workers := [entry for entry in os.listdir("/proc") if str(output) in command_line(entry)]:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(worker), signal.SIGKILL)
        time.sleep(0.05)


def command_line(process: str) -> str:
    try:
        with open(f"/proc/{process}/cmdline") as file:
            return file.read()
    except OSError:
        return ""


@pytest.mark.slow
def test_a_sharded_run_killed_and_resumed_exports_what_one_process_does(tiny, tmp_path):
    output = tmp_path / "two"
    state = tmp_path / ".two.run"
    checkpoint = state / "distill" / "checkpoint-2"
    log = tmp_path / "log"
    with log.open("w") as file:
        process = launch(tiny, output, file)
        while not checkpoint.exists():
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        kill(process, output)
        sharded = [*checkpoint.glob("pytorch_model_fsdp_0*"), *checkpoint.glob("optimizer_0")]
        assert sharded, "the model was not sharded"
        assert launch(tiny, output, file).wait(timeout=300) in (0, 1), log.read_text()
    load_and_run(tiny, tmp_path / "one", *SETTINGS)
    assert_same_but_for_rounding(output, tmp_path / "one")
    assert verify(output, tiny) == []
    two = read_manifest(output).distillation
    one = read_manifest(tmp_path / "one").distillation
    assert dict(two["losses"]) == pytest.approx(dict(one["losses"]), rel=1e-5)
    assert dict(two["held_out"]) == pytest.approx(dict(one["held_out"]), rel=1e-5)
    assert not state.exists()


def assert_same_but_for_rounding(directory, other):
    """Two processes add up gradients in another order, which moves a weight or two over the edge of
    an FP8 step, and others by a step of BF16.
    """
    ours = TensorFiles(directory)
    theirs = TensorFiles(other)
    assert ours.specs == theirs.specs
    for name in ours:
        tensor = ours.read(name)
        expected = theirs.read(name)
        if tensor.dtype == torch.float8_e4m3fn:
            apart = (tensor.float() - expected.float()).abs()
            assert (apart > 0).float().mean() < 1e-4, name
            one_step = tensor.float().abs() / 8 + 2**-9  # E4M3 has three bits of mantissa
            assert (apart <= one_step).all(), name
        else:
            torch.testing.assert_close(tensor, expected, rtol=2**-7, atol=1e-5, msg=name)
