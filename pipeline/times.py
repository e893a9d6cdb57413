"""How long the steps of a run took, for the manifest."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any


class Times:
    """Seconds by step. Of a resumed run, a step's are those of the last attempt."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._seconds: dict[str, float] = {}

    def end(self, step: str) -> None:
        """End a step; the next one begins."""
        now = time.monotonic()
        self._seconds[step] = round(now - self._begun, 1)
        self._begun = now

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        return {"finished": finished, "seconds": dict(self._seconds)}
