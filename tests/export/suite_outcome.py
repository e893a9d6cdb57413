"""The outcome of a suite for an export, as `hybridquant accuracy --suite` writes it: made by the
same functions, from scores that are given.
"""

import json
from pathlib import Path

from accuracy.suites.asking import REASONING_OFF
from accuracy.suites.catalogue import choose_tasks
from accuracy.suites.harness import DataSource, Item
from accuracy.suites.outcome import Compared, CurvePoint, Noise
from accuracy.suites.published import published_curve, published_row
from accuracy.suites.report import as_dict
from accuracy.suites.run import SuitePlan, SuiteRun
from accuracy.suites.serving import Model
from accuracy.suites.verdict import TaskScores, compare_tasks
from checkpoint.video import Video

COUNT = 1000
RIGHT = {"chartqa": (897, 895), "mathvista": (690, 640), "video_mme": (660, 657)}
"""Right answers of 1,000 under BF16 and under the export. MathVista loses five points."""


def scores(right: int, failed: int = 0) -> TaskScores:
    found = {str(number): float(number < right) for number in range(COUNT - failed)}
    return TaskScores(found, COUNT, failed)


def suite_outcome(directory: Path, reference: Path) -> dict:
    """An outcome with a benchmark that passed, one that lost, failed requests and a curve."""
    plan = SuitePlan(
        tasks=choose_tasks("report", list(RIGHT)),
        source=DataSource(Path("data")),
        video=Video(),
        profile=REASONING_OFF,
        out=Path("out"),
        max_loss=1.5,
    )
    run = SuiteRun(plan, {})
    ours = {name: scores(right) for name, (right, _) in RIGHT.items()}
    theirs = {name: scores(right, failed=3) for name, (_, right) in RIGHT.items()}
    items = {name: [Item(str(number)) for number in range(COUNT)] for name in RIGHT}
    published = {name: published_row(name) for name in RIGHT}
    rows = compare_tasks(ours, theirs, items, plan.max_loss, published, run.not_comparable())
    variant = Model(directory)
    compared = [Compared(variant, run.hash_of(variant), tuple(rows))]
    curves = published_curve("video_mme")
    points = []
    for rate, accuracy in ((0.0, 66.1), (0.75, 65.2), (0.9, 63.0)):
        beside = {precision: curve[rate] for precision, curve in curves.items()}
        points.append(CurvePoint("video_mme", directory, rate, accuracy, COUNT, beside))
    noise = [Noise("chartqa", COUNT, 12, 4)]
    return as_dict(run, "report", Model(reference), compared, noise, points)


def write_outcome(path: Path, directory: Path, reference: Path) -> Path:
    path.write_text(json.dumps(suite_outcome(directory, reference)))
    return path
