"""What a distillation keeps on disk to be resumed from.

checkpoint-N/      weights, optimizer, schedule, random states and position in the samples after
                   step N
best.safetensors   the weights with the lowest held-out loss so far
.partial/          the checkpoint that is being written

transformers writes a checkpoint file by file, so it writes into `.partial`. What is whole is then
renamed: a kill leaves whole checkpoints only.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import gather_object

from checkpoint.atomic import rename_directory, write_json
from checkpoint.config import read_json
from quantize.distill.plan import DistillationPlan

WEIGHTS = "trained.safetensors"
"""The trained weights in a checkpoint."""
BEST = "best.safetensors"
PARTIAL = ".partial"
_PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """How far a process has come.

    Attributes:
        position: Position in the samples where the next step begins.
        tokens: Tokens that this process has trained on, visual ones included.
        history: Held-out loss by step.
    """

    position: int
    tokens: int
    history: Mapping[int, float]


def whole_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints in a directory, oldest first."""
    found = []
    for path in directory.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name):
            found.append(path)
    return sorted(found, key=step_of)


def last_checkpoint(directory: Path) -> Path | None:
    """Return the newest checkpoint in a directory; None if there is none."""
    found = whole_checkpoints(directory)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps made before a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def remove_partial(plan: DistillationPlan) -> None:
    """Remove what a killed run was writing; every process must call this."""
    if plan.processes.is_first:
        shutil.rmtree(plan.directory / PARTIAL, ignore_errors=True)
    plan.processes.wait()


def finish_checkpoint(plan: DistillationPlan, step: int, progress: Progress) -> None:
    """Complete the checkpoint that transformers has written and give it its name.

    Every process must call this, with its own progress.
    """
    partial = plan.directory / PARTIAL / f"checkpoint-{step}"
    # This also waits until all processes have written their parts.
    processes = gather_object([{"position": progress.position, "tokens": progress.tokens}])
    if plan.processes.is_first:
        history = list(progress.history.items())
        write_json(partial / _PROGRESS, {"processes": processes, "history": history})
        rename_directory(partial, plan.directory / partial.name)
        plan.record(step)
        # Only the newest is read, so a kill may leave older ones in parts.
        for older in whole_checkpoints(plan.directory)[:-1]:
            shutil.rmtree(older)
    plan.processes.wait()


def read_progress(checkpoint: Path, process: int) -> Progress:
    """Read a process's progress from a checkpoint."""
    saved = read_json(checkpoint / _PROGRESS)
    own = saved["processes"][process]
    history = {int(step): float(loss) for step, loss in saved["history"]}
    return Progress(own["position"], own["tokens"], history)
