"""One process and several: the same scales from PTQ, the same loss curve from distillation, one
directory from each.

    python -m benchmarks.processes --work DIR --json benchmarks/results/processes_2gpu.json
    [--processes 2]

Runs the commands that a user would: `torchrun -m quantize.fp8` and `accelerate launch … -m
quantize.qad` with FSDP2, on the tiny checkpoint. Distillation runs twice in one process, so that
what rounding alone does to a curve is known. A run that was cut off goes on with the same command:
what it finished is kept in DIR. `--device cpu` runs the PTQ half, through gloo: accelerate's FSDP2
wants an accelerator.
"""

from __future__ import annotations

import argparse
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

from benchmarks.parts import Parts, write_json
from checkpoint.faults import BadInput, Fault, main
from checkpoint.files import TensorFiles
from export.manifest import read_manifest
from pipeline.inputs import versions
from tiny.checkpoint import tiny_checkpoint

_WITHOUT_TASKS = "accuracy.tasks=null"
FSDP2 = (
    *("--mixed_precision", "no", "--use_fsdp", "--fsdp_version", "2"),
    *(
        "--fsdp_auto_wrap_policy",
        "TRANSFORMER_BASED_WRAP",
        "--fsdp_transformer_layer_cls_to_wrap",
        "NemotronHBlock",
    ),
    *("--fsdp_cpu_ram_efficient_loading", "false"),
)


def visible(processes: int) -> str:
    """CUDA_VISIBLE_DEVICES of so many processes: the first of those that the user left visible."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ",".join(given.split(",")[:processes] if given else map(str, range(processes)))


def launched(command: Sequence[str], device: str, processes: int = 1) -> float:
    """Run a command of this package and return its seconds; it may miss its gate (exit status 1).

    Raises:
        RuntimeError: It ended otherwise; with the end of what it said.
    """
    shown = {"CUDA_VISIBLE_DEVICES": visible(processes)}
    # Sums are made in one order only where every process has as many threads.
    environment = os.environ | (shown if device == "cuda" else {"OMP_NUM_THREADS": "1"})
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-3000:]}"
        )
    return time.monotonic() - start


def same_files(one: Path, other: Path) -> bool:
    """Whether the tensors of two directories are the same bytes."""
    return all(
        (one / file).read_bytes() == (other / file).read_bytes() for file in TensorFiles(one).files
    )


def ptq(work: Path, processes: int, device: str, model: Path, parts: Parts) -> dict[str, Any]:
    """FP8 and NVFP4 by one process and by several."""

    def both(name: str) -> dict[str, Any]:
        alone, shared = work / f"{name}-1", work / f"{name}-{processes}"
        module = ("-m", f"quantize.{name}", f"recipes/tiny/{name}.yaml", f"model={model}", "calibrate.samples=64",
                  _WITHOUT_TASKS)  # fmt: skip
        torchrun = (
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        )
        for output in (alone, shared):
            shutil.rmtree(output, ignore_errors=True)
        seconds = [launched((*module, f"output={alone}"), device)]
        seconds.append(launched((*torchrun, *module, f"output={shared}"), device, processes))
        return {"same_bytes": same_files(alone, shared), "seconds": seconds}

    found = {}
    for name in ("fp8", "nvfp4"):
        found[name] = parts.part(name, functools.partial(both, name))
        print(name, found[name], flush=True)
    return found


def distilled(work: Path, processes: int, steps: int, model: Path, parts: Parts) -> dict[str, Any]:
    """Loss curves of one process, of one again, and of several with FSDP2.

    `apart` is the largest difference from the first curve over its first loss.
    """
    module = ("-m", "quantize.qad", "recipes/tiny/nvfp4_qad.yaml", f"model={model}", f"distill.steps={steps}",
              _WITHOUT_TASKS)  # fmt: skip
    launch = ("-m", "accelerate.commands.launch", "--num_processes", str(processes), *FSDP2)

    def curves(output: Path, prefix: tuple[str, ...], count: int) -> dict[str, Any]:
        shutil.rmtree(output, ignore_errors=True)
        seconds = launched((*prefix, *module, f"output={output}"), "cuda", count)
        manifest = read_manifest(output)
        assert manifest is not None
        return {"seconds": seconds} | {
            key: manifest.distillation[key] for key in ("losses", "held_out")
        }

    found: dict[str, Any] = {}
    runs: tuple[tuple[str, tuple[str, ...], int], ...] = (("one", (), 1), ("one_again", (), 1))
    for name, prefix, count in (*runs, ("several", launch, processes)):
        found[name] = dict(
            parts.part(name, functools.partial(curves, work / f"qad-{name}", prefix, count))
        )
        for curve in ("losses", "held_out"):
            first, mine = ([loss for _, loss in found[run][curve]] for run in ("one", name))
            found[name][f"{curve}_apart"] = (
                max(abs(a - b) for a, b in zip(first, mine, strict=True)) / first[0]
            )
        print(
            name, {key: value for key, value in found[name].items() if key != "losses"}, flush=True
        )
    return found


def measure(work: Path, processes: int, steps: int, device: str) -> dict[str, Any]:
    """Run everything; seconds, shares and nats a token."""
    work.mkdir(parents=True, exist_ok=True)
    model = tiny_checkpoint(work / "bf16").directory
    parts = Parts(
        work / "measured.json", {"processes": processes, "steps": steps, "device": device}
    )
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "processes": processes,
        "versions": versions(),
        "ptq": ptq(work, processes, device, model, parts),
    }
    if device == "cuda":
        result["distilled"] = distilled(work, processes, steps, model, parts)
    parts.done()
    return result


def _run() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.processes", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for exports")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="of distillation")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args()
    if given.device == "cuda" and torch.cuda.device_count() < given.processes:
        there = f"{torch.cuda.device_count()} CUDA devices are there"
        raise BadInput(Fault("--processes", there, "try --device cpu"))
    result = measure(given.work, given.processes, given.steps, given.device)
    shape = f"--processes {given.processes} --steps {given.steps} --device {given.device}"
    result["command"] = f"python -m benchmarks.processes --work DIR {shape}"
    write_json(given.json, result)
    return 0


if __name__ == "__main__":
    main(_run)
