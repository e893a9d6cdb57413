"""Asks the ChartQA of a folder through a URL, one request at a time; a test kills it.

python ask_suite.py FOLDER DIRECTORY URL
"""

import sys
from pathlib import Path

from accuracy.suites.asking import REASONING_OFF
from accuracy.suites.catalogue import choose_tasks
from accuracy.suites.harness import DataSource
from accuracy.suites.run import SuitePlan, open_suite
from accuracy.suites.serving import Model
from checkpoint.video import Video


def plan_of(folder: Path, names: list[str], concurrency: int = 1, repeats: int = 1) -> SuitePlan:
    return SuitePlan(
        tasks=choose_tasks("report", names),
        source=DataSource(folder, is_own=True),
        video=Video(pruning_rate=0.0, max_frames=8),
        profile=REASONING_OFF,
        concurrency=concurrency,
        out=folder / "out",
        max_loss=1.5,
        repeats=repeats,
    )


if __name__ == "__main__":
    data, directory, url = sys.argv[1:]
    with open_suite(plan_of(Path(data), ["chartqa"]), Path(directory)) as run:
        scores = run.scores(Model(Path(directory), url), run.plan.video)
    print(len(scores["chartqa"].scores))
