"""Shows how many items of a checkpoint are answered and how long the rest will take."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from checkpoint.log import get_logger

logger = get_logger(__name__)

_SPEED_SECONDS = 120.0
"""The time left is that of the last two minutes' speed."""
_LOG_SECONDS = 60.0
"""Seconds between two lines where there is no terminal for a bar."""


class AskingProgress:
    """A bar on a terminal; elsewhere a line in the log every minute."""

    def __init__(self, name: str, total: int) -> None:
        """Begin.

        Args:
            name: What is asked.
            total: Items to ask.
        """
        self._name = name
        self._total = total
        self._turn = threading.Lock()
        self._logged = time.monotonic()
        console = Console(stderr=True)
        self._has_bar = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[at_once]} at once,"),
            TimeElapsedColumn(),
            TextColumn("gone,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not self._has_bar,
            speed_estimate_period=_SPEED_SECONDS,
        )
        self._bar = self._progress.add_task(name, total=total, at_once=0)

    def begin(self, task: str, at_once: int) -> None:
        """Show which task is asked, and with how many requests at a time."""
        self._progress.update(self._bar, description=f"{self._name}: {task}", at_once=at_once)

    def answered(self, at_once: int) -> None:
        """Count an item.

        Args:
            at_once: Requests at a time now.
        """
        self._progress.update(self._bar, advance=1, at_once=at_once)
        if not self._has_bar:
            self._log()

    def _log(self) -> None:
        now = time.monotonic()
        with self._turn:
            if now - self._logged < _LOG_SECONDS:
                return
            self._logged = now
        shown = self._progress.tasks[0]
        seconds = shown.time_remaining
        left = "" if seconds is None else f", about {show_duration(seconds)} left"
        logger.info(
            "%s: %d of %d items%s", shown.description, int(shown.completed), self._total, left
        )

    def __enter__(self) -> AskingProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


def show_duration(seconds: float) -> str:
    """Return a duration as people say it: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
