"""Compares one process with several: PTQ must write the same bytes, distillation the same losses.

    python -m benchmarks.processes --work DIR --json benchmarks/results/processes_2gpu.json

Runs the commands that a user would run, on the tiny checkpoint: `torchrun -m quantize.fp8`, and
`accelerate launch … -m quantize.qad` with FSDP2. Distillation runs twice in one process, to find
how far two curves are apart by rounding alone. The same command resumes a measurement that was
stopped; what is finished is kept in DIR. `--device cpu` runs the half about PTQ, with gloo, because
accelerate's FSDP2 needs a GPU.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import device_name
from benchmarks.parts import Parts, write_json
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import BadInput, Fault, main
from checkpoint.files import TensorFiles
from checkpoint.libraries import installed_versions
from checkpoint.log import get_logger
from export.manifest import read_manifest
from recipes.loading import SHIPPED
from tiny.checkpoint import tiny_checkpoint

logger = get_logger("benchmarks.processes")

_WITHOUT_TASKS = "accuracy.tasks=null"
FSDP2 = (
    *("--mixed_precision", "no"),
    *("--use_fsdp", "--fsdp_version", "2"),
    *("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_transformer_layer_cls_to_wrap", "NemotronHBlock"),
    *("--fsdp_cpu_ram_efficient_loading", "false"),
)
"""Options of `accelerate launch` for FSDP2, without mixed precision."""


def visible(processes: int) -> str:
    """Return CUDA_VISIBLE_DEVICES for a number of processes: the first GPUs the user can see."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given:
        devices = given.split(",")[:processes]
    else:
        devices = [str(number) for number in range(processes)]
    return ",".join(devices)


def launched(command: Sequence[str], device: str, processes: int = 1) -> float:
    """Run a command of this project and return its seconds.

    Args:
        command: Arguments of the Python interpreter.
        device: `cuda` or `cpu`.
        processes: Number of GPUs that the command can see.

    Raises:
        RuntimeError: The exit status is not 0, nor 1 as for a missed gate. The message has the end
            of stderr.
    """
    if device == "cuda":
        changed = {"CUDA_VISIBLE_DEVICES": visible(processes)}
    else:
        # Sums have the same order only if every process has the same number of threads.
        changed = {"OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | changed, capture_output=True, text=True
    )
    if done.returncode not in (0, 1):
        shown = " ".join(command)
        end = done.stderr[-3000:]
        raise RuntimeError(f"{shown}: exit status {done.returncode}\n{end}")
    return time.monotonic() - start


def same_files(one: Path, other: Path) -> bool:
    """Return whether the weight files of `one` have the same bytes in `other`."""
    for file in TensorFiles(one).files:
        if (one / file).read_bytes() != (other / file).read_bytes():
            return False
    return True


def ptq(work: Path, processes: int, device: str, model: Path, parts: Parts) -> dict[str, Any]:
    """Measure FP8 and NVFP4 in one process and in several.

    Args:
        work: Folder of the exports.
        processes: How many the several are.
        device: `cuda` or `cpu`.
        model: The BF16 checkpoint.
        parts: Results that are finished.

    Returns:
        For each format, whether the bytes are the same, and the seconds of both runs.
    """
    found = {}
    for name in ("fp8", "nvfp4"):
        compare = functools.partial(_compare_ptq, name, work, processes, device, model)
        found[name] = parts.part(name, compare)
        logger.info("%s: %s", name, found[name])
    return found


def _compare_ptq(name: str, work: Path, processes: int, device: str, model: Path) -> dict[str, Any]:
    alone = work / f"{name}-1"
    shared = work / f"{name}-{processes}"
    for output in (alone, shared):
        shutil.rmtree(output, ignore_errors=True)
    recipe = SHIPPED / "tiny" / f"{name}.yaml"
    command = ["-m", f"quantize.{name}", str(recipe), f"model={model}"]
    command += ["calibrate.samples=64", _WITHOUT_TASKS]
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node", str(processes)]
    one = launched([*command, f"output={alone}"], device)
    several = launched([*torchrun, *command, f"output={shared}"], device, processes)
    return {"same_bytes": same_files(alone, shared), "seconds": [one, several]}


def distilled(work: Path, processes: int, steps: int, model: Path, parts: Parts) -> dict[str, Any]:
    """Measure the losses of distillation in one process, again in one, and in several with FSDP2.

    Args:
        work: Folder of the exports.
        processes: How many the several are.
        steps: Of distillation.
        model: The BF16 checkpoint.
        parts: Results that are finished.

    Returns:
        For each run, its seconds and losses in nats. `…_apart` is the largest difference from the
        first run's curve, relative to the first run's first loss.
    """
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), *FSDP2]
    runs: dict[str, tuple[list[str], int]] = {
        "one": ([], 1),
        "one_again": ([], 1),
        "several": (launcher, processes),
    }
    found: dict[str, Any] = {}
    for name, (prefix, count) in runs.items():
        output = work / f"qad-{name}"
        run = functools.partial(_distil, output, prefix, count, steps, model)
        found[name] = dict(parts.part(name, run))
        for curve in ("losses", "held_out"):
            apart = _largest_difference(found["one"][curve], found[name][curve])
            found[name][f"{curve}_apart"] = apart
        shown = {key: value for key, value in found[name].items() if key != "losses"}
        logger.info("%s: %s", name, shown)
    return found


def _distil(
    output: Path, prefix: Sequence[str], processes: int, steps: int, model: Path
) -> dict[str, Any]:
    shutil.rmtree(output, ignore_errors=True)
    recipe = SHIPPED / "tiny" / "nvfp4_qad.yaml"
    command = ["-m", "quantize.qad", str(recipe), f"model={model}", f"distill.steps={steps}"]
    # One process would fill its rows with other samples than two.
    command += ["distill.pack_length=null", "distill.batch=8"]
    command += [_WITHOUT_TASKS, f"output={output}"]
    seconds = launched([*prefix, *command], "cuda", processes)
    manifest = read_manifest(output)
    assert manifest is not None
    return {
        "seconds": seconds,
        "losses": manifest.distillation["losses"],
        "held_out": manifest.distillation["held_out"],
    }


def _largest_difference(first: list[list[float]], other: list[list[float]]) -> float:
    """Compare two curves of (step, loss); relative to the first loss of `first`."""
    differences = []
    for (_, one), (_, two) in zip(first, other, strict=True):
        differences.append(abs(one - two))
    return max(differences) / first[0][1]


def measure(work: Path, processes: int, steps: int, device: str) -> dict[str, Any]:
    """Measure everything.

    Args:
        work: Folder of the exports and of what is finished.
        processes: How many processes are compared with one.
        steps: Of distillation.
        device: `cuda` or `cpu`; distillation is measured on `cuda` only.

    Returns:
        Seconds, relative differences, and losses in nats per token.
    """
    work.mkdir(parents=True, exist_ok=True)
    model = tiny_checkpoint(work / "bf16").directory
    settings = {"processes": processes, "steps": steps, "device": device}
    parts = Parts(work / "measured.json", settings)
    result: dict[str, Any] = {
        "device": device_name(device),
        "processes": processes,
        "versions": installed_versions(),
        "ptq": ptq(work, processes, device, model, parts),
    }
    if device == "cuda":
        result["distilled"] = distilled(work, processes, steps, model, parts)
    parts.done()
    return result


def _run() -> int:
    parser = command_parser("benchmarks.processes", __doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for exports")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="of distillation")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parse_command(parser)
    if given.device == "cuda" and torch.cuda.device_count() < given.processes:
        what = f"{given.processes} are too many for {torch.cuda.device_count()} CUDA devices"
        raise BadInput(Fault("--processes", what, "try --device cpu"))
    result = measure(given.work, given.processes, given.steps, given.device)
    options = f"--processes {given.processes} --steps {given.steps} --device {given.device}"
    result["command"] = f"python -m benchmarks.processes --work DIR {options}"
    write_json(given.json, result)
    return 0


if __name__ == "__main__":
    main(_run)
