"""Estimates how long the suite `report` takes on one GPU, from throughput that was measured.

    python -m benchmarks.suite_duration --json benchmarks/results/suite_duration_h100.json

Nothing is run: the published number of items of each benchmark is divided by the requests per
second of video_serve_h100.json. A clip of a benchmark has 128 frames, twice as many as the clips
that were measured there, and is taken to last twice as long.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from accuracy.suites.catalogue import REPORT
from checkpoint.atomic import write_json
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import main
from checkpoint.video import Video

MEASURED = Path(__file__).with_name("results") / "video_serve_h100.json"
PAGES = "32 pages, 16 at once"
CLIPS = "12 clips of 32 s at once"
_CLIP_SECONDS = 32

ITEMS = {
    "mmmu": 900,
    "mathvista": 1000,
    "ai2d": 3088,
    "ocrbench": 1000,
    "ocrbench_v2": 7400,
    "ocr_reasoning": 1069,
    "chartqa": 2500,
    "docvqa": 5349,
    "infovqa": 2801,
    "textvqa": 5000,
    "video_mme": 2700,
    "longvideobench": 1337,
}
"""Items that are asked, by the papers of the benchmarks: of MMMU and LongVideoBench the validation
split, of OCRBench v2 the English part."""


def estimate(measured: dict[str, Any], video: Video) -> dict[str, Any]:
    """Return items, requests per second and minutes by benchmark, and hours in all.

    Args:
        measured: The content of video_serve_h100.json.
        video: How clips are seen.
    """
    pages = _rate(measured, PAGES)
    measured_frames = _CLIP_SECONDS * video.fps
    clips = _rate(measured, CLIPS) * measured_frames / video.max_frames
    rows = []
    total = 0.0
    for task in REPORT:
        rate = clips if task.is_video else pages
        minutes = ITEMS[task.name] / rate / 60
        total += minutes
        rows.append(
            {
                "task": task.name,
                "items": ITEMS[task.name],
                "requests_per_s": round(rate, 3),
                "minutes": round(minutes, 1),
            }
        )
    return {"measured": rows, "hours_per_directory": round(total / 60, 1)}


def _rate(measured: dict[str, Any], load: str) -> float:
    rates = measured["measured"][load]["requests per second"]["plugin"]
    return statistics.mean(rates)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.suite_duration", __doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the estimate there too")
    return parser


def _run() -> int:
    arguments = parse_command(_parser())
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    found = estimate(measured, Video())
    table = Table("task", "items", "requests/s", "minutes")
    for row in found["measured"]:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    print(f"{found['hours_per_directory']} hours for each directory")
    if arguments.json:
        origin = {
            "command": f"python -m benchmarks.suite_duration --json {arguments.json}",
            "device": measured["device"],
            "vllm": measured["vllm"],
            "notes": [
                f"An estimate: items divided by the rates of {MEASURED.name}, which were measured "
                "with random weights and the plug-in, 16 pages or 12 clips at once.",
                "Clips of 128 frames are taken to last twice as long as those of 64 frames there. "
                "Reading a clip of many minutes and long answers are not in it.",
            ],
        }
        write_json(arguments.json, origin | found)
    return 0


if __name__ == "__main__":
    main(_run)
