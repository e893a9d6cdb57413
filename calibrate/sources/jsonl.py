"""JSON Lines files of OpenAI chat messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from calibrate.samples import Sample, Skipped, sample_from_row, usable_samples
from checkpoint.faults import BadInput, Fault


def read_jsonl(path: str | Path, skipped: Skipped | None = None) -> Iterator[Sample]:
    """Yield the samples of a JSON Lines file, one object with `messages` a line.

    `id` and `answer` are taken over when there. Media are local paths relative to the file's
    directory, `file://` URLs or base64 `data:` URLs. Bad lines go to `skipped` (without one, the
    first raises).

    Raises:
        BadInput: The file is missing or holds no usable sample, or `skipped` is full.
    """
    path, skipped = Path(path), skipped if skipped is not None else Skipped()
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise BadInput(
            Fault(str(path), f"cannot be read: {error.strerror}", "give a JSON Lines file")
        ) from None
    with file:
        lines = ((number, line) for number, line in _numbered_lines(file, path) if line.strip())
        none = Fault(str(path), "holds no usable sample", 'one {"messages": […]} a line')
        yield from usable_samples(
            lines,
            lambda n, line: sample_from_row(
                _json_object(line, f"{path}: line {n}"), str(path), str(n), path.parent
            ),
            skipped,
            none,
        )


def _numbered_lines(file: Iterable[str], path: Path) -> Iterator[tuple[int, str]]:
    try:
        yield from enumerate(file, start=1)
    except (UnicodeDecodeError, OSError) as error:
        raise BadInput(
            Fault(str(path), f"cannot be read as UTF-8 text: {error}", "give a JSON Lines file")
        ) from None


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadInput(Fault(where, f"is not JSON: {error}", "one object a line")) from None
    if not isinstance(value, dict):
        raise BadInput(
            Fault(where, f"holds a {type(value).__name__}, not an object", "one object a line")
        )
    return value
