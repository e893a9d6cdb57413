"""What a distillation keeps on disk to be resumed from.

checkpoint-N/      weights, optimizer, schedule, random states and position in the samples after
                   step N
best.safetensors   the weights with the lowest held-out loss so far
.partial/          the checkpoint that is being written

transformers writes a checkpoint file by file, so it writes into `.partial`. What is whole is then
renamed: a kill leaves whole checkpoints only. Each lists its files with a hash: transformers would
go on without the optimizer's state, and without a word, where that file is missing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open

from checkpoint.atomic import free_bytes, rename_directory, write_json
from checkpoint.config import read_json
from checkpoint.faults import BadInput, Fault
from checkpoint.files import in_threads
from quantize.distill.plan import DistillationPlan

WEIGHTS = "trained.safetensors"
"""The trained weights in a checkpoint."""
BEST = "best.safetensors"
PARTIAL = ".partial"
_PROGRESS = "progress.json"
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")
"""What torch's errors of writing a file mention."""

_PIECES = 1024
_PIECE_BYTES = 2**16
"""Of a file larger than all pieces together, only so many are hashed: a checkpoint of the 12B has
hundreds of gigabytes, and all processes wait meanwhile.
"""


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


@contextlib.contextmanager
def disk_errors(directory: Path, needed: int) -> Iterator[None]:
    """Raise the system's error where torch cannot write a file.

    Trap of torch 2.11: `torch.save` raises a `RuntimeError` about positions in its container where
    the disk is full, and not the system's error.

    Args:
        directory: Where the body writes.
        needed: Bytes of a checkpoint: with fewer free, the disk is full.

    Raises:
        OSError: torch's writer has failed.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _TORCH_WRITER):
            raise
        number = errno.ENOSPC if free_bytes(directory) < needed else errno.EIO
        raise OSError(number, os.strerror(number), str(directory)) from error


def finish_checkpoint(plan: DistillationPlan, step: int, progress: Progress) -> None:
    """Complete the checkpoint that transformers has written and give it its name.

    Every process must call this, with its own progress.
    """
    partial = plan.directory / PARTIAL / f"checkpoint-{step}"
    # This also waits until all processes have written their parts.
    processes = gather_object([{"position": progress.position, "tokens": progress.tokens}])
    if plan.processes.is_first:
        history = list(progress.history.items())
        files = _digests(partial)
        content = {"processes": processes, "history": history, "files": files}
        write_json(partial / _PROGRESS, content)
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


def checkpoint_faults(directory: Path) -> Iterator[Fault]:
    """Yield what is wrong with the newest checkpoint in a directory, and with the best weights.

    Args:
        directory: Of a distillation; without a checkpoint nothing is wrong.
    """
    checkpoint = last_checkpoint(directory)
    if checkpoint is None:
        return
    remedy = f"restore it to resume the run, or remove {directory.parent} to start again"
    progress = checkpoint / _PROGRESS
    try:
        written = read_json(progress).get("files")
    except BadInput as bad:
        yield from (Fault(fault.where, fault.what, remedy) for fault in bad.faults)
        return
    if not isinstance(written, dict):
        yield Fault(str(progress), "does not list the checkpoint's files", remedy)
        return
    found = _digests(checkpoint)
    for name, digest in written.items():
        if name not in found:
            yield Fault(str(checkpoint / name), "is missing", remedy)
        elif found[name] != digest:
            yield Fault(str(checkpoint / name), "is not as it was written", remedy)
    best = directory / BEST
    try:
        with safe_open(best, framework="pt"):
            pass  # its size must be what its header says
    except (OSError, SafetensorError):
        yield Fault(str(best), "is missing or cut short", remedy)


def _digests(checkpoint: Path) -> dict[str, str]:
    """Hashes of a checkpoint's files but the list itself, by their paths in it."""
    names = []
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path != checkpoint / _PROGRESS:
            names.append(path.relative_to(checkpoint).as_posix())
    digests = in_threads(lambda name: _digest(checkpoint / name), names)
    return dict(zip(names, digests, strict=True))


def _digest(path: Path) -> str:
    """SHA-256 of a file's size and content; of a large file's, in pieces from its beginning to its
    end.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - _PIECE_BYTES)
    pieces = min(_PIECES, math.ceil(size / _PIECE_BYTES))
    with path.open("rb") as file:
        for number in range(pieces):
            file.seek(last * number // max(1, pieces - 1))
            digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()
