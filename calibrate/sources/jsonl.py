"""JSON Lines files of OpenAI chat messages, one conversation per line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from calibrate.samples import Sample, Skipped, sample_from_row, usable_samples
from calibrate.sources.source import Source, register_source
from checkpoint.faults import BadInput, Fault

_EXPECTED = "give a JSON Lines file"


@register_source
class JsonlSource(Source):
    """A JSON Lines file of OpenAI chat messages with local images and videos."""

    type: Literal["jsonl"]
    path: Path
    """The file; media paths in it are relative to its directory."""

    def read(self, samples: int, seed: int, skipped: Skipped) -> Iterator[Sample]:
        """Yield the samples of the file, in order."""
        return read_jsonl(self.path, skipped)

    def files(self) -> list[Path]:
        """The file itself."""
        return [self.path]


def read_jsonl(path: str | Path, skipped: Skipped | None = None) -> Iterator[Sample]:
    """Yield the samples of a JSON Lines file, one object with `messages` per line.

    `id` and `answer` are taken over if present. Media are local paths relative to the file's
    directory, `file://` URLs or base64 `data:` URLs. Bad lines go to `skipped`; without it, the
    first bad line raises.

    Raises:
        BadInput: The file is missing or contains no usable sample, or `skipped` is full.
    """
    path = Path(path)
    skipped = skipped if skipped is not None else Skipped()
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise BadInput(Fault(str(path), f"cannot be read: {error.strerror}", _EXPECTED)) from None

    def parse(number: int, line: str) -> Sample:
        row = _json_object(line, f"{path}: line {number}")
        return sample_from_row(row, str(path), str(number), path.parent)

    none = Fault(str(path), "contains no usable sample", 'one {"messages": […]} per line')
    with file:
        yield from usable_samples(_numbered_lines(file, path), parse, skipped, none)


def _numbered_lines(file: Iterable[str], path: Path) -> Iterator[tuple[int, str]]:
    try:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line
    except (UnicodeDecodeError, OSError) as error:
        what = f"cannot be read as UTF-8 text: {str(error)[:200]}"
        raise BadInput(Fault(str(path), what, _EXPECTED)) from None


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(Fault(where, f"is not JSON: {error}", "one object per line")) from None
    if not isinstance(value, dict):
        what = f"is a JSON {type(value).__name__}, not an object"
        raise BadInput(Fault(where, what, "one object per line"))
    return value
