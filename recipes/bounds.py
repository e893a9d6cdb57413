"""Refuses YAML that is too large to load: before it is loaded, by its events alone."""

from __future__ import annotations

from typing import Any

import yaml

MOST_CHARACTERS = 1_000_000
MOST_LEVELS = 32
MOST_VALUES = 20_000

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def bounds_fault(text: str) -> str | None:
    """Return what is too large about a YAML text, or None.

    PyYAML's loader crashes the interpreter on deep nesting, and OmegaConf copies what an alias
    stands for, so that a few lines of aliases to aliases take all memory.

    Raises:
        yaml.YAMLError: The text is not YAML.
    """
    if len(text) > MOST_CHARACTERS:
        return f"has more than {MOST_CHARACTERS:,} characters"
    counter = _Counter()
    for event in yaml.parse(text, Loader=_LOADER):
        counter.add(event)
        if len(counter.open) > MOST_LEVELS:
            return f"is nested more than {MOST_LEVELS} levels deep"
        if counter.values > MOST_VALUES:
            return f"has more than {MOST_VALUES:,} values, those of aliases included"
        if counter.is_recursive:
            return "has an alias inside the value that it stands for"
    return None


class _Counter:
    """Counts the values of a document as if every alias were written out.

    Attributes:
        values: Values so far.
        open: Lists and mappings that have not ended: their anchor, and `values` before them.
        is_recursive: Whether an alias stands inside its own value.
    """

    def __init__(self) -> None:
        self.values = 0
        self.open: list[tuple[str | None, int]] = []
        self.is_recursive = False
        self._sizes: dict[str, int] = {}

    def add(self, event: Any) -> None:
        """Count one event of the parser."""
        if isinstance(event, yaml.CollectionStartEvent):
            self.open.append((event.anchor, self.values))
            self.values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = self.open.pop()
            self._remember(anchor, self.values - before)
        elif isinstance(event, yaml.ScalarEvent):
            self.values += 1
            self._remember(event.anchor, 1)
        elif isinstance(event, yaml.AliasEvent):
            anchor = str(event.anchor)
            # An unknown alias is an error of the loader's.
            self.values += self._sizes.get(anchor, 1)
            self.is_recursive = any(anchor == name for name, _ in self.open)

    def _remember(self, anchor: str | None, size: int) -> None:
        if anchor is not None:
            self._sizes[anchor] = size
