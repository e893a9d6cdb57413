"""Measures distillation on GPUs: tokens per second and peak memory, with the command of a user.

    python -m benchmarks.training MODEL --work DIR --json FILE --processes 2 [key=value …]

Launches `quantize.qad` with recipes/nvfp4_qad.yaml under FSDP2 (`--processes 1`: without), on few
samples: packed rows as the recipe has them, or by `distill.pack_length=null` one sample a row. The
plan's peak of memory is compared with what was used. The run is ended after the evaluation of its
last step; what is written afterwards is tested elsewhere. The figures are those that the run itself
logs. The first step compiles and tunes kernels, so that the rate is the median of the steps after
it, as far as there are any. Memory is the peak of the first process since the training began.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import device_name, mamba_kernels
from benchmarks.parts import write_json
from benchmarks.processes import FSDP2, visible
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import BadInput, Fault, main, shortened
from checkpoint.libraries import installed_versions
from checkpoint.run_state import RunState
from recipes.loading import SHIPPED

_GRACE_SECONDS = 30
"""How long the launcher may take to end its workers."""
_SHOWN_LINES = 12
"""Last lines of a run's output that are shown if it fails."""
# As `quantize.distill.step_log` writes it. Step 0 has no loss, and a CPU has no GPU memory.
_LINE = re.compile(
    r"step (?P<step>\d+) of \d+: held-out KL (?P<held_out>[\d.]+) nats"
    r"(, step's (?P<loss>[\d.]+), (?P<rate>[\d,]+) tokens/s)?"
    r"(, GPU memory at most (?P<memory>[\d.]+) GB)?"
)
# As it writes every step with --verbose.
_STEP = re.compile(
    r"step (?P<step>\d+) of \d+: \S.* (?P<loss>[\d.]+) nats, "
    r"(?P<seconds>[\d.]+) s, (?P<rate>[\d,]+) tokens/s"
)
# As `pipeline.plan` writes it.
_PLANNED = re.compile(r"(?P<gigabytes>[\d.]+) GB a process at the peak")


def parsed(line: str) -> dict[str, float] | None:
    """Read a progress line of a distillation.

    Returns:
        Those of these that the line has: `step`, `held_out` and `loss` in nats per token, `rate` in
        tokens/s, `memory` in GB. None if it is not a progress line.
    """
    return _figures(_LINE.search(line))


def parsed_step(line: str) -> dict[str, float] | None:
    """Read the line of a step.

    Returns:
        `step`, `loss` in nats per token, `seconds`, and `rate` in tokens/s. None if it is not the
        line of a step.
    """
    return _figures(_STEP.search(line))


def _figures(match: re.Match[str] | None) -> dict[str, float] | None:
    """Return the named groups that matched, as numbers."""
    if match is None:
        return None
    figures = {}
    for name, text in match.groupdict().items():
        if text is not None:
            figures[name] = float(text.replace(",", ""))
    return figures


def measure(command: Sequence[str], steps: int, processes: int) -> dict[str, Any]:
    """Run a distillation until the evaluation of its last step.

    Args:
        command: Arguments of the Python interpreter.
        steps: Number of the last step.
        processes: Number of GPUs that the command can see.

    Returns:
        `plan`, what the run logs about its samples; `progress`, its progress lines with the seconds
        since its start; `steps`, each step; and what `summary` returns.

    Raises:
        BadInput: The run ends before its last step. The message has the end of its output.
    """
    start = time.monotonic()
    output = list[str]()
    progress = list[dict[str, float]]()
    each = list[dict[str, float]]()
    changed = {"CUDA_VISIBLE_DEVICES": visible(processes), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | changed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                seconds = time.monotonic() - start
                output.append(line.rstrip())
                print(f"{seconds:6.1f} s  {output[-1]}", flush=True)
                step = parsed_step(line)
                if step is not None:
                    each.append(step)
                figures = parsed(line)
                if figures is None:
                    continue
                progress.append(figures | {"seconds": round(seconds, 1)})
                if figures["step"] == steps:
                    break
        finally:
            _end(process)
    if not progress or progress[-1]["step"] != steps:
        faults = [Fault("quantize.qad", "ended before its last step", "see its output")]
        for line in output[-_SHOWN_LINES:]:
            faults.append(Fault("output", shortened(line)))
        raise BadInput(*faults)
    plan = [line for line in output if "samples of about" in line or _PLANNED.search(line)]
    return {"plan": plan, "progress": progress, "steps": each, **summary(plan, progress, each)}


def summary(
    plan: Sequence[str],
    progress: Sequence[Mapping[str, float]],
    each: Sequence[Mapping[str, float]],
) -> dict[str, float]:
    """Return what a run took, beside its plan.

    Args:
        plan: What the run logs about its samples.
        progress: Its progress lines.
        each: Its steps.

    Returns:
        Those of these that are known: `tokens_per_second` over all processes, the median of the
        steps after the first; `first_step_seconds`; `peak_gb` and `planned_gb` of memory a process,
        and `peak_of_planned`, one divided by the other.
    """
    found = {}
    if each:
        later = each[1:] or each
        found["tokens_per_second"] = statistics.median(step["rate"] for step in later)
        found["first_step_seconds"] = each[0]["seconds"]
    peaks = [line["memory"] for line in progress if "memory" in line]
    if peaks:
        found["peak_gb"] = max(peaks)
    for line in plan:
        match = _PLANNED.search(line)
        if match is not None:
            found["planned_gb"] = float(match["gigabytes"])
    if "peak_gb" in found and found.get("planned_gb"):
        found["peak_of_planned"] = round(found["peak_gb"] / found["planned_gb"], 3)
    return found


def _end(process: subprocess.Popen[str]) -> None:
    """End a launcher and its workers.

    A launcher that is killed leaves its workers running on the GPUs. One that gets SIGTERM ends
    them first.
    """
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_SECONDS)
    process.kill()


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.training", __doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--work", type=Path, required=True, help="folder for what the run keeps")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    parser.add_argument("--processes", type=int, default=1, help="one per GPU")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="fields of recipes/nvfp4_qad.yaml"
    )
    return parser


def _command(given: argparse.Namespace, output: Path) -> list[str]:
    """Return the arguments of the Python interpreter that distil on few samples."""
    launcher = ["-m", "accelerate.commands.launch"]
    launcher += ["--num_processes", str(given.processes), *FSDP2]
    command = [
        "-m",
        "quantize.qad",
        str(SHIPPED / "nvfp4_qad.yaml"),
        "--verbose",
        f"model={given.model}",
        f"output={output}",
        f"distill.steps={given.steps}",
        f"distill.save_every={given.steps}",
        "calibrate.samples=4",
        "accuracy.samples=1",
        f"distill.held_out={2 * given.processes}",
        *given.settings,
    ]
    if given.processes > 1:
        return [*launcher, *command]
    return command


def _run() -> int:
    given = parse_command(_parser())
    if torch.cuda.device_count() < given.processes:
        what = f"{given.processes} are too many for {torch.cuda.device_count()} CUDA devices"
        raise BadInput(Fault("--processes", what, "give as many as there are GPUs"))
    given.work.mkdir(parents=True, exist_ok=True)
    output = given.work / "qad"
    state = RunState(output, identity={})
    shutil.rmtree(output, ignore_errors=True)
    state.remove()
    options = ["MODEL", "--work", "DIR", "--processes", str(given.processes)]
    options += ["--steps", str(given.steps), *given.settings]
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.training", *options]),
        "device": device_name("cuda"),
        "processes": given.processes,
        "versions": installed_versions(),
        "mamba_kernels": mamba_kernels(),
        **measure(_command(given, output), given.steps, given.processes),
    }
    state.remove()
    write_json(given.json, result)
    return 0


if __name__ == "__main__":
    main(_run)
