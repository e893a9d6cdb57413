"""What a run leaves on disk while it goes on, so that the same command resumes it after a kill.

.NAME.run/run.json       what must be the same for the run to be resumed
.NAME.run/progress.json  what has been finished
.NAME.run/lock           held by the process that works here
.NAME.run/checkpoint/    the output while it is written; renamed to NAME at the end
.NAME.run/…              files of the way that the run takes (see the modules that write them)

Every piece is written beside its name and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.atomic import output_faults, remove_directory, rename_directory, write_json
from checkpoint.config import read_json
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.lock import LOCK, lock_faults, locked_directory

_RUN = "run.json"
_PROGRESS = "progress.json"


@dataclass(frozen=True)
class RunState:
    """The state of one run.

    Attributes:
        output: Where the checkpoint goes.
        identity: What must be the same for the run to be resumed, by dotted name.
    """

    output: Path
    identity: Mapping[str, Any]

    @property
    def directory(self) -> Path:
        """`.NAME.run` beside the output."""
        output = self.output.absolute()
        return output.with_name(f".{output.name}.run")

    @property
    def checkpoint(self) -> Path:
        """The output while it is written."""
        return self.directory / "checkpoint"

    @property
    def is_begun(self) -> bool:
        """Whether an earlier run left something to resume from."""
        progress = self.progress()
        if not progress or not (self.directory / _RUN).exists():
            return False
        # A finished output that was removed before it was verified leaves nothing.
        return not progress.get("written") or self.output.exists() or self.checkpoint.exists()

    @property
    def is_written(self) -> bool:
        """Whether the output is whole and in its place, so that only verifying and measuring
        remain.
        """
        written = self.progress().get("written") is True
        return written and self.output.exists() and not self.checkpoint.exists()

    def faults(self) -> Iterator[Fault]:
        """Yield why this run cannot work here: no run can, or another than this one was begun."""
        faults = list(place_faults(self.output))
        yield from faults or self._differences()

    @property
    def _remedy(self) -> str:
        """What to do about a state that this run cannot go on from."""
        return f"restore it to resume the run, or remove {self.directory} to start again"

    def _differences(self) -> Iterator[Fault]:
        """Yield in what this run differs from the one that was begun here."""
        if not self.is_begun:
            return
        before = self._read(_RUN)
        for name in sorted({*before, *self.identity}):
            old = before.get(name)
            new = self.identity.get(name)
            if old != new:
                what = f"was {shortened(old)} when {self.directory} was begun, is {shortened(new)}"
                yield Fault(name, what, self._remedy)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the directory and hold its lock for the length of a `with` block.

        Raises:
            BadInput: Another process holds it, or has begun or finished another run since `faults`.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with locked_directory(self.directory):
            faults = list(self._differences())
            if not self.is_written:
                faults += output_faults(self.output)
            if faults:
                self.remove_if_useless()
                raise BadInput(*faults)
            yield

    def begin(self) -> None:
        """Write down what the directory belongs to; keep what there is to resume, and only that.

        Call it under `locked`.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / LOCK).touch()
        if not self.is_begun:
            self._clear()
        write_json(self.directory / _RUN, self.identity)

    def _clear(self) -> None:
        """Remove everything but the lock."""
        for entry in self.directory.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()

    def progress(self) -> dict[str, Any]:
        """What has been recorded; empty when nothing has."""
        return self._read(_PROGRESS) if (self.directory / _PROGRESS).exists() else {}

    def _read(self, name: str) -> dict[str, Any]:
        """Read a file of the state; raises `BadInput` if it is damaged."""
        try:
            return read_json(self.directory / name)
        except BadInput as bad:
            raise BadInput(*(Fault(f.where, f.what, self._remedy) for f in bad.faults)) from None

    def record(self, **finished: Any) -> None:
        """Add to what is finished."""
        write_json(self.directory / _PROGRESS, self.progress() | finished)

    def publish(self) -> None:
        """Rename the finished checkpoint to the output."""
        self.record(written=True)
        rename_directory(self.checkpoint, self.output)

    def how_to_resume(self) -> str:
        """What the user can do after an interrupted run, in one sentence."""
        if self.is_begun:
            return f"interrupted; the same command resumes from {self.directory}"
        return "interrupted before anything was kept; the same command starts again"

    def remove(self) -> None:
        """Remove the state. Call it when the result is on disk and measured."""
        remove_directory(self.directory)

    def remove_if_useless(self) -> None:
        """Remove a state that a later run could not resume from."""
        if not self.is_begun:
            self.remove()


def place_faults(output: Path) -> Iterator[Fault]:
    """Yield why no run can write an output: another one does, what lies in its state's place is not
    a run's, or the output exists and no run has left it to be verified.
    """
    state = RunState(output, {})
    held = list(lock_faults(state.directory))
    if held:
        yield from held
    elif _is_foreign(state.directory):
        what = "is in the way of the run's state, and no run has made it"
        yield Fault(str(state.directory), what, "move it, or give another output")
    elif not state.is_written:
        yield from output_faults(output)


def _is_foreign(directory: Path) -> bool:
    """Whether something lies in the place of a run's state that no run has put there."""
    if directory.is_symlink() or not directory.is_dir():
        return directory.is_symlink() or directory.exists()
    # `locked` creates the lock before anything else.
    return any(directory.iterdir()) and not (directory / LOCK).is_file()


def identity_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested mappings to dotted names, so that a difference can be named."""
    flat: dict[str, Any] = {}
    for key, value in parts.items():
        if isinstance(value, Mapping):
            for name, leaf in identity_of(value).items():
                flat[f"{key}.{name}"] = leaf
        else:
            flat[str(key)] = json.loads(json.dumps(value, default=str))
    return flat


def file_stamp(path: Path) -> list[int]:
    """Size in bytes and modification time in ns of a file; empty if there is none."""
    if not path.exists():
        return []
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content; empty if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
