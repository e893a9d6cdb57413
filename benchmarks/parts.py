"""A measurement's files: its result, and what a long one has finished, so that the same command
goes on from there.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Work = Callable[[], dict[str, Any]]


def write_json(path: Path, measured: Mapping[str, Any]) -> None:
    """Write a result that is whole or not there, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def at_once(todo: Mapping[str, Work], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What comes of each piece of work, as it is done: in this process, or in `jobs` others.

    Raises:
        Exception: What a piece raised, when those that were under way are done; others are not
            begun.
    """
    if jobs == 1:
        yield from ((name, work()) for name, work in todo.items())
        return
    failed: BaseException | None = None
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        coming = {pool.submit(work): name for name, work in todo.items()}
        for done in concurrent.futures.as_completed(coming):
            if done.cancelled():
                continue
            if error := done.exception():
                failed = failed or error
                pool.shutdown(wait=False, cancel_futures=True)
            else:
                yield coming[done], done.result()
    if failed:
        raise failed


class Parts:
    """Results of named parts, and whatever else was noted by the end of the last one.

    Attributes:
        path: The file; it is there from the first finished part on.
        noted: Plain data, kept with the parts.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any]) -> None:
        """Take up what a run of the same `plan` left; a run of another plan is begun anew."""
        self.path, self.plan = path, json.loads(json.dumps(plan))
        self.noted: dict[str, dict[str, float]] = {}
        self._found: dict[str, dict[str, Any]] = {}
        if (
            path.exists()
            and (kept := json.loads(path.read_text(encoding="utf-8")))["plan"] == self.plan
        ):
            self._found, self.noted = kept["found"], kept["noted"]
            print(f"measured before: {', '.join(self._found)}", flush=True)

    def part(self, name: str, work: Work) -> dict[str, Any]:
        """Run `work` unless it was finished before; return what it returned, which is plain data."""
        return self.all({name: work})[name]

    def all(self, todo: Mapping[str, Work], jobs: int = 1) -> dict[str, dict[str, Any]]:
        """Run what was not finished before, in this process or in `jobs` others, and keep each part
        as it is done.

        Returns:
            What each part returned, by name.

        Raises:
            Exception: What a part raised, when those that were under way are kept; others are not
                begun.
        """
        for name, found in at_once(
            {name: work for name, work in todo.items() if name not in self._found}, jobs
        ):
            self._found[name] = found
            write_json(self.path, {"plan": self.plan, "found": self._found, "noted": self.noted})
        return {name: self._found[name] for name in todo}

    def done(self) -> None:
        """Forget everything: the next run measures anew."""
        self.path.unlink()
