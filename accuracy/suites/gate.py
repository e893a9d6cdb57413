"""Runs the suites that a recipe's gate names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from accuracy.settings import Suites
from accuracy.suites.asking import REASONING_OFF
from accuracy.suites.catalogue import choose_tasks
from accuracy.suites.harness import DataSource, find_python
from accuracy.suites.report import as_dict, show
from accuracy.suites.run import SuitePlan, open_suite
from accuracy.suites.serving import Model
from checkpoint.lock import locked_directory
from checkpoint.video import Video


def measure_gate(
    required: Suites, directory: Path, reference: Path, video: Video, out: Path
) -> dict[str, Any]:
    """Serve BF16 and a result, ask the benchmarks, and show the comparison.

    Args:
        required: The recipe's section.
        directory: The result.
        reference: BF16's directory.
        video: How clips are seen.
        out: Folder for answers and logs.

    Returns:
        The outcome for the manifest; `passed` says whether the gate passed.

    Raises:
        BadInput: The harnesses or the data are missing.
        ServerDied: A server died twice.
    """
    find_python()
    plan = SuitePlan(
        tasks=choose_tasks("report", required.names),
        source=DataSource(data_folder(required.data), required.own_data, None, required.limit),
        video=video,
        profile=REASONING_OFF,
        out=out,
        max_loss=required.max_loss,
    )
    out.mkdir(parents=True, exist_ok=True)
    with locked_directory(out), open_suite(plan, reference) as run:
        compared = run.compare(Model(reference), [Model(directory)])
        show(compared, Model(reference), plan.max_loss)
        return as_dict(run, "report", Model(reference), compared)


def data_folder(given: Path | None) -> Path:
    """Return VLMEvalKit's folder of tables: the given one, or its own default."""
    if given is not None:
        return given
    named = os.environ.get("LMUData")  # noqa: SIM112  (VLMEvalKit spells it so)
    return Path(named) if named else Path.home() / "LMUData"
