"""Asks the OCRBench of a folder through a URL, one request at a time; a test kills it.

python ask_suite.py FOLDER OUT DIRECTORY URL
"""

import json
import sys
import urllib.request
from pathlib import Path

from accuracy.suites.asking import REASONING_OFF
from accuracy.suites.catalogue import choose_tasks
from accuracy.suites.harness import DataSource
from accuracy.suites.run import SuitePlan, open_suite
from accuracy.suites.serving import Model
from checkpoint.video import Video


def plan_of(
    folder: Path,
    names: list[str],
    concurrency: int | None = 1,
    repeats: int = 1,
    out: Path | None = None,
) -> SuitePlan:
    return SuitePlan(
        tasks=choose_tasks("report", names),
        source=DataSource(folder, is_own=True),
        video=Video(pruning_rate=0.0, max_frames=8),
        profile=REASONING_OFF,
        out=out or folder / "out",
        max_loss=1.5,
        repeats=repeats,
        concurrency=concurrency,
    )


def kept_answers(out: Path) -> list[dict]:
    """Every line that a run has kept, failed requests too."""
    lines = []
    for file in sorted(out.glob("answers/*.jsonl")):
        whole = [line for line in file.read_text().splitlines(keepends=True) if line[-1:] == "\n"]
        lines += [json.loads(line) for line in whole]
    return lines


def answered_requests(url: str) -> int:
    """How many requests a vLLM server says that it has answered to the end."""
    root = url.removesuffix("/v1")
    with urllib.request.urlopen(f"{root}/metrics") as response:
        lines = response.read().decode().splitlines()
    total = 0.0
    for line in lines:
        ended = 'finished_reason="stop"' in line or 'finished_reason="length"' in line
        if line.startswith("vllm:request_success_total") and ended:
            total += float(line.rpartition(" ")[2])
    return int(total)


if __name__ == "__main__":
    data, out, directory, url = sys.argv[1:]
    with open_suite(plan_of(Path(data), ["ocrbench"], out=Path(out)), Path(directory)) as run:
        scores = run.scores(Model(Path(directory), url), run.plan.video)
    print(len(scores["ocrbench"].scores))
