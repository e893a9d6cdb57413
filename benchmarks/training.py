"""What distillation of a checkpoint takes: tokens a second and peak memory of a GPU, by the command
that a user gives.

    python -m benchmarks.training MODEL --work DIR --json FILE --processes 2 [--steps 4] [key=value
    …]

Launches `quantize.qad` on recipes/nvfp4_qad.yaml under FSDP2 (`--processes 1`: alone), with short
samples unless told otherwise, and ends it after the last step's evaluation: what is written
afterwards is tested elsewhere. Figures are those the run itself prints; memory is the first
process's from the beginning of the training on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.parts import write_json
from benchmarks.processes import FSDP2, visible
from checkpoint.faults import BadInput, Fault, main
from checkpoint.libraries import find_mamba_kernels
from pipeline.inputs import versions

_GRACE_SECONDS = 30
_LINE = re.compile(
    r"step (?P<step>\d+) of \d+: held-out KL (?P<held_out>[\d.]+) nats"
    r"(, step's (?P<loss>[\d.]+), (?P<rate>[\d,]+) tokens/s)?(, GPU memory at most (?P<memory>[\d.]+) GB)?"
)


def parsed(line: str) -> dict[str, float] | None:
    """A progress line of a distillation: step, held-out KL and loss in nats, tokens/s, peak GPU
    memory in GB.
    """
    found = _LINE.search(line)
    if found is None:
        return None
    return {
        name: float(text.replace(",", ""))
        for name, text in found.groupdict().items()
        if text is not None
    }


def measure(command: Sequence[str], steps: int, processes: int) -> dict[str, Any]:
    """Run a distillation until the evaluation of its last step; what it said by then.

    Raises:
        BadInput: It ended before, with the end of what it said.
    """
    start, said, progress = time.monotonic(), list[str](), list[dict[str, float]]()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible(processes), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                said.append(line.rstrip())
                print(f"{time.monotonic() - start:6.1f} s  {said[-1]}", flush=True)
                if found := parsed(line):
                    progress.append(found | {"seconds": round(time.monotonic() - start, 1)})
                    if found["step"] == steps:
                        break
        finally:
            # A launcher that is killed leaves its workers on the GPUs; asked to end, it ends them
            # first.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
            process.kill()
    if not progress or progress[-1]["step"] != steps:
        raise BadInput(
            Fault("quantize.qad", "ended before its last step", "see what it said"),
            *(Fault("it said", line) for line in said[-12:]),
        )
    plan = [line for line in said if "samples of about" in line]
    return {"plan": plan, "progress": progress}


def _run() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--work", type=Path, required=True, help="folder for what the run keeps")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="fields of recipes/nvfp4_qad.yaml"
    )
    given = parser.parse_intermixed_args()
    if torch.cuda.device_count() < given.processes:
        there = f"{torch.cuda.device_count()} CUDA devices are there"
        raise BadInput(Fault("--processes", there, f"{given.processes} are asked for"))
    given.work.mkdir(parents=True, exist_ok=True)
    output = given.work / "qad"
    for left in (output, output.with_name(".qad.qad")):
        shutil.rmtree(left, ignore_errors=True)
    few = ["calibrate.samples=4", "accuracy.samples=1", f"distill.held_out={2 * given.processes}"]
    shape = [
        f"distill.steps={given.steps}",
        f"distill.save_every={given.steps}",
        *few,
        *given.settings,
    ]
    launch = ["-m", "accelerate.commands.launch", "--num_processes", str(given.processes), *FSDP2]
    module = [
        "-m",
        "quantize.qad",
        "recipes/nvfp4_qad.yaml",
        f"model={given.model}",
        f"output={output}",
        *shape,
    ]
    options = [
        "MODEL",
        "--work",
        "DIR",
        "--processes",
        str(given.processes),
        "--steps",
        str(given.steps),
    ]
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.training", *options, *given.settings]),
        "device": torch.cuda.get_device_name(),
        "processes": given.processes,
        "versions": versions(),
        "mamba_kernels": find_mamba_kernels() or "mamba_ssm",
        **measure(
            [*(launch if given.processes > 1 else []), *module], given.steps, given.processes
        ),
    }
    shutil.rmtree(output.with_name(".qad.qad"), ignore_errors=True)
    write_json(given.json, result)
    return 0


if __name__ == "__main__":
    main(_run)
