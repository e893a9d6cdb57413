"""The published figures, from published.json: in percent, with their sources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("published.json")
_SOURCE = "source"


@cache
def _contents() -> dict[str, Any]:
    contents: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return contents


def published_row(task: str) -> dict[str, float]:
    """Return a task's published figures by precision; empty if there are none."""
    row = _contents()["suites"].get(task, {})
    return {name: value for name, value in row.items() if name != _SOURCE}


def source_of(task: str) -> str | None:
    """Return where a task's figures were published; None if there are none."""
    row = _contents()["suites"].get(task)
    if row is None:
        return None
    return str(_contents()["sources"][row[_SOURCE]])


def published_curve(task: str) -> Mapping[str, Mapping[float, float]]:
    """Return a video suite's published accuracy by precision and EVS rate."""
    curves = _contents()["evs"].get(task, {})
    found = {}
    for precision, points in curves.items():
        found[precision] = {float(rate): value for rate, value in points.items()}
    return found


def published_rates() -> tuple[float, ...]:
    """Return the EVS rates of the published figure."""
    rates: set[float] = set()
    for task in _contents()["evs"]:
        for points in published_curve(task).values():
            rates.update(points)
    return tuple(sorted(rates))
