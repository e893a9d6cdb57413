"""What result files say about two sets of answers to the same items."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from accuracy.paired import Paired


def described(row: Paired) -> dict[str, Any]:
    """Return a row of `accuracy.paired` as plain data, with its difference."""
    return dataclasses.asdict(row) | {"difference": row.difference}


def differing(
    reference: Mapping[str, Sequence[object]], variant: Mapping[str, Sequence[object]]
) -> dict[str, int]:
    """Return how many answers are not the reference's, by task.

    Args:
        reference: Answers by task.
        variant: Answers to the same items.
    """
    found = {}
    for task, answers in reference.items():
        pairs = zip(answers, variant[task], strict=True)
        found[task] = sum(one != other for one, other in pairs)
    return found
