"""A measurement's files: its result, and what a long one has finished, so that the same command goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, measured: Mapping[str, Any]) -> None:
    """Write a result that is whole or not there, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


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
        if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8")))["plan"] == self.plan:
            self._found, self.noted = kept["found"], kept["noted"]
            print(f"measured before: {', '.join(self._found)}", flush=True)

    def has(self, name: str) -> bool:
        """Whether a part was finished before."""
        return name in self._found

    def part(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run `work` unless it was finished before; return what it returned, which is plain data."""
        if name not in self._found:
            self._found[name] = work()
            write_json(self.path, {"plan": self.plan, "found": self._found, "noted": self.noted})
        return self._found[name]

    def done(self) -> None:
        """Forget everything: the next run measures anew."""
        self.path.unlink()
