"""Keeps the finished parts of a long measurement, so that the same command resumes it."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint import atomic
from checkpoint.log import get_logger

logger = get_logger(__name__)

Work = Callable[[], dict[str, Any]]


def write_json(path: Path, measured: Mapping[str, Any]) -> None:
    """Write a result file, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, measured)


def at_once(
    todo: Mapping[str, Work], jobs: int, prepare: Callable[[], None] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Do several pieces of work and yield each result, by name, as soon as it is there.

    Args:
        todo: The pieces by name.
        jobs: Number of processes; 1 does the work in this process, one piece after another.
        prepare: Called in each new process before the modules of its work are imported. Work with
            the model needs `checkpoint.libraries.prepare_libraries`, or it runs without mamba_ssm's
            kernels.

    Raises:
        Exception: What a piece raised. It is raised after the pieces that were running are done and
            yielded; no other piece is started.
    """
    if jobs == 1:
        for name, work in todo.items():
            yield name, work()
        return
    failed: BaseException | None = None
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, spawn, initializer=prepare) as pool:
        names = {pool.submit(work): name for name, work in todo.items()}
        for done in concurrent.futures.as_completed(names):
            if done.cancelled():
                continue
            error = done.exception()
            if error is None:
                yield names[done], done.result()
                continue
            if failed is None:
                failed = error
            pool.shutdown(wait=False, cancel_futures=True)
    if failed is not None:
        raise failed


class Parts:
    """The results of named parts of a measurement, kept in a file until the measurement is done.

    Attributes:
        path: The file; it exists from the first finished part on.
        noted: Further plain data that is kept with the parts.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Load what an earlier run with the same settings has finished.

        Args:
            path: The file.
            settings: Plain data that describes the measurement. Results of other settings are
                dropped.
        """
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.noted: dict[str, dict[str, float]] = {}
        self._found: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("settings") == self.settings:
            self._found = kept["found"]
            self.noted = kept["noted"]
            logger.info("measured before: %s", ", ".join(self._found))

    def get(self, name: str) -> dict[str, Any] | None:
        """Return the result of a part; None where it is not finished."""
        return self._found.get(name)

    def part(self, name: str, work: Work) -> dict[str, Any]:
        """Do one piece of work unless it was finished before, and return its result.

        Args:
            name: Name of the part.
            work: Returns plain data.
        """
        return self.all({name: work})[name]

    def all(
        self, todo: Mapping[str, Work], jobs: int = 1, prepare: Callable[[], None] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Do every piece of work that was not finished before; save each as soon as it is done.

        Args:
            todo: The pieces by name; each returns plain data.
            jobs: Number of processes, as in `at_once`.
            prepare: As in `at_once`.

        Returns:
            The result of each piece, by name.

        Raises:
            Exception: What a piece raised. The pieces that were running then are saved; no other
                piece is started.
        """
        missing = {name: work for name, work in todo.items() if name not in self._found}
        for name, found in at_once(missing, jobs, prepare):
            self._found[name] = found
            kept = {"settings": self.settings, "found": self._found, "noted": self.noted}
            write_json(self.path, kept)
        return {name: self._found[name] for name in todo}

    def done(self) -> None:
        """Remove the file; the next run measures everything again."""
        self.path.unlink()
