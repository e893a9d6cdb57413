"""Short names by which tables and messages tell directories apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def directory_names(directories: Sequence[Path]) -> list[str]:
    """Return the last part of each directory's path, or as much more of all as they differ by:
    `a/export` and `b/export`.
    """
    return shortest_different([path_endings(directory) for directory in directories])


def path_endings(directory: Path) -> list[str]:
    """Return the ends of a directory's path, links resolved, from its last part to the whole."""
    # Unlike Path.resolve(), realpath() raises no error for a circle of links.
    parts = Path(os.path.realpath(directory)).parts
    return [str(Path(*parts[start:])) for start in range(len(parts) - 1, -1, -1)]


def shortest_different(choices: Sequence[Sequence[str]]) -> list[str]:
    """Return a name for each of several things, by which they are told apart.

    Args:
        choices: Names that each may have, from its shortest to the fullest.

    Returns:
        Names of one length that all differ. Where even the fullest do not, the shortest: `export`,
        `export (2)`.
    """
    longest = max(len(names) for names in choices)
    for length in range(longest):
        found = [names[min(length, len(names) - 1)] for names in choices]
        if len(set(found)) == len(found):
            return found
    numbered: list[str] = []
    for names in choices:
        name = names[0]
        number = 2
        while name in numbered:
            name = f"{names[0]} ({number})"
            number += 1
        numbered.append(name)
    return numbered
