"""Measures how fast a served checkpoint answers a benchmark at several numbers of requests at a
time, and at the number that `hybridquant accuracy --suite` finds by itself.

    python -m benchmarks.suite_load DIR --data FOLDER --json benchmarks/results/suite_load_cpu.json

FOLDER holds an OCRBench.tsv of one's own (tests/accuracy/suite_data.py FOLDER 160). One server
answers all of it; each number asks every item anew.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from accuracy.suites.asking import REASONING_OFF
from accuracy.suites.catalogue import choose_tasks
from accuracy.suites.harness import DataSource
from accuracy.suites.outcome import Asked
from accuracy.suites.run import SuitePlan, open_suite
from accuracy.suites.serving import Model
from benchmarks.environment import device_name
from checkpoint.atomic import write_json
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import main
from checkpoint.video import Video
from serve.environment import find_environment
from serve.process import running_server

NUMBERS = (1, 4, 8, 16, 32)


def measure(directory: Path, data: Path, url: str, at_once: int | None) -> Asked:
    """Ask every item of an OCRBench.

    Args:
        directory: The checkpoint that is served.
        data: Folder of the table.
        url: The server.
        at_once: Requests at a time; None for as many as keep the server busy.
    """
    with tempfile.TemporaryDirectory() as out:
        plan = SuitePlan(
            tasks=choose_tasks("report", ["ocrbench"]),
            source=DataSource(data, is_own=True),
            video=Video(),
            profile=REASONING_OFF,
            out=Path(out),
            max_loss=1.5,
            concurrency=at_once,
        )
        with open_suite(plan, directory) as run:
            run.scores(Model(directory, url), plan.video)
        return run.asked[0]


def _row(asked: Asked, is_found: bool) -> dict[str, Any]:
    steps = [vars(step) | {"answers_per_s": round(step.rate, 3)} for step in asked.steps]
    return {
        "at_once": asked.at_once,
        "is_found": is_found,
        "items": asked.items,
        "failed": asked.failed,
        "seconds": round(asked.seconds, 2),
        "answers_per_s": round(asked.items / asked.seconds, 3),
        "steps": steps,
    }


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.suite_load", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    return parser


def _run() -> int:
    arguments = parse_command(_parser())
    environment = find_environment()
    rows = []
    with running_server(arguments.directory, environment=environment) as server:
        measure(arguments.directory, arguments.data, server.url, 8)  # a first pass warms it up
        for at_once in (*NUMBERS, None):
            asked = measure(arguments.directory, arguments.data, server.url, at_once)
            rows.append(_row(asked, at_once is None))
    table = Table("requests at a time", "answers/s", "seconds")
    for row in rows:
        name = f"{row['at_once']}{' (found)' if row['is_found'] else ''}"
        table.add_row(name, str(row["answers_per_s"]), str(row["seconds"]))
    Console().print(table)
    if arguments.json:
        result = {
            "command": f"python -m benchmarks.suite_load {arguments.directory.name} --data FOLDER",
            "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
            "vllm": environment.version,
            "notes": [
                "One server; a first pass, not in the file, has put the pictures into vLLM's cache "
                "of prepared media, so that every number finds them there.",
            ],
            "measured": rows,
        }
        write_json(arguments.json, result)
    return 0


if __name__ == "__main__":
    main(_run)
