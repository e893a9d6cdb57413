"""What a long measurement has finished, kept in a file: a run that was cut off goes on with the same command."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


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
            kept = {"plan": self.plan, "found": self._found, "noted": self.noted}
            partial = self.path.with_name(f".{self.path.name}.partial")
            partial.write_text(json.dumps(kept), encoding="utf-8")
            os.replace(partial, self.path)
        return self._found[name]

    def done(self) -> None:
        """Forget everything: the next run measures anew."""
        self.path.unlink()
