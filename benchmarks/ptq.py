"""Compares post-training quantization by this project and by stock ModelOpt, in one run.

    python -m benchmarks.ptq MODEL --work DIR --json benchmarks/results/ptq_fp8.json
    python -m benchmarks.ptq MODEL --work DIR --json FILE --format nvfp4 --samples 1024
    python -m checkpoint.synthetic MODEL --size full      # the 12B's layout with random weights

This project quantizes with the whole model in memory and layer by layer; `--whole` leaves the
latter out. Everything runs in one process, on one device, with the same prompts: random token ids
of one length, so that the rate of the forward pass is well defined. Each stage is timed once after
a warm-up of the kernels, the raw forward pass three times. Ratios are between stages of the same
run. The same command resumes a run that was stopped: of the ways, the finished ones are kept in
DIR. `--device cpu` tries the program on the tiny checkpoint, with FP8 only: stock ModelOpt has no
NVFP4 on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.parts import write_json
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import BadInput, Fault, main
from checkpoint.libraries import prepare_libraries

_TABLES = ("seconds", "peak_gpu_gb", "peak_host_gb", "versions")
"""Fields of the result that have a value per stage or package."""


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.ptq", __doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="folder for the exports, on the disk to be measured",
    )
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    parser.add_argument("--format", choices=("fp8", "nvfp4"), default="fp8")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048, help="per sample")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--whole", action="store_true", help="leave the way layer by layer out")
    return parser


def _check(given: argparse.Namespace) -> None:
    """Check that the measurement is possible on the device.

    Raises:
        BadInput: It is not.
    """
    if given.device == "cuda" and not torch.cuda.is_available():
        remedy = "try --device cpu with the tiny checkpoint"
        raise BadInput(Fault("--device", "there is no CUDA device", remedy))
    if given.device == "cpu" and given.format != "fp8":
        what = f"stock ModelOpt cannot quantize to {given.format} on a CPU"
        raise BadInput(Fault("--format", what, "use fp8"))


def _show(result: dict[str, Any]) -> None:
    """Print a table of the stages, then the other figures."""
    table = Table(title=f"{result['format']} on {result['device']}", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("peak GPU, GB", justify="right")
    table.add_column("peak host, GB", justify="right")
    for stage, seconds in result["seconds"].items():
        gpu = result["peak_gpu_gb"][stage]
        host = result["peak_host_gb"][stage]
        table.add_row(stage, f"{seconds:.1f}", f"{gpu:.1f}", f"{host:.1f}")
    Console().print(table)
    print({name: value for name, value in result.items() if name not in _TABLES})


def _run() -> int:
    given = parse_command(_parser())
    _check(given)
    prepare_libraries()
    from benchmarks.ptq_ways import measure

    result = measure(
        given.model,
        given.work,
        given.format,
        given.samples,
        given.tokens,
        given.device,
        layers=not given.whole,
    )
    options = f"--format {given.format} --samples {given.samples} --tokens {given.tokens}"
    if given.whole:
        options += " --whole"
    result["command"] = f"python -m benchmarks.ptq MODEL --work DIR {options}"
    _show(result)
    write_json(given.json, result)
    return 0


if __name__ == "__main__":
    main(_run)
