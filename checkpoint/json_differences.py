"""Which keys of two JSON objects differ. Does not import torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from checkpoint.faults import shortened

MISSING = object()
"""The value of a key that is not there."""


def json_differences(ours: object, theirs: object) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name and both values of every key that differs, in the order of the names;
    `MISSING` stands for the value of a key that one of them lacks.
    """
    waiting: list[tuple[str, Any, Any]] = [("", ours, theirs)]
    while waiting:
        name, first, second = waiting.pop()
        if isinstance(first, dict) and isinstance(second, dict):
            for key in sorted({*first, *second}, reverse=True):
                dotted = f"{name}.{shortened(key, 80)}" if name else shortened(key, 80)
                waiting.append((dotted, first.get(key, MISSING), second.get(key, MISSING)))
        elif first is MISSING or second is MISSING or not _is_same(first, second):
            yield name, first, second


def _is_same(first: object, second: object) -> bool:
    """Whether two JSON values are the same; 1, 1.0 and true differ."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
