"""JSON Lines files of OpenAI chat messages, one conversation per line."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, TextIO

from calibrate.samples import Sample, Skipped, sample_from_row, usable_samples
from calibrate.sources.source import Source, register_source
from checkpoint.faults import BadInput, Fault, raise_if_any, shortened
from checkpoint.reading import json_kind, regular_file_fault

_EXPECTED = "give a JSON Lines file"

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "ZIP",
}
"""How compressed files begin."""


@register_source
class JsonlSource(Source):
    """A JSON Lines file of OpenAI chat messages with local images and videos."""

    example: ClassVar[str] = """\
{"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]}
{"messages": [{"role": "user", "content": [{"type": "image", "image": "page.png"}, \
{"type": "text", "text": "Which number is it?"}]}], "answer": "1047"}
{"messages": [{"role": "user", "content": [{"type": "video", "video": "clips/a.mp4"}, \
{"type": "text", "text": "What happens?"}]}], "answer": "A door opens."}"""

    type: Literal["jsonl"]
    path: Path
    """The file; media paths in it are relative to its directory."""

    def read(self, samples: int, seed: int, skipped: Skipped) -> Iterator[Sample]:
        """Yield the samples of the file, in order."""
        return read_jsonl(self.path, skipped)

    def count(self, samples: int) -> int:
        """Lines or elements, at most `samples`."""
        return count_rows(self.path, samples)

    def files(self) -> list[Path]:
        """The file itself."""
        return [self.path]


def read_jsonl(path: str | Path, skipped: Skipped | None = None) -> Iterator[Sample]:
    """Yield the samples of a JSON Lines file, one object with `messages` per line.

    A `.json` file may hold an array of such objects instead.

    `id` and `answer` are taken over if present. Media are local paths relative to the file's
    directory, `file://` URLs or base64 `data:` URLs. Bad lines go to `skipped`; without it, the
    first bad line raises.

    Raises:
        BadInput: The file is missing or contains no usable sample, or `skipped` is full.
    """
    path = Path(path)
    skipped = skipped if skipped is not None else Skipped()
    none = Fault(str(path), "contains no usable sample", 'one {"messages": […]} per line')

    def parse(number: int, row: Any) -> Sample:
        return sample_from_row(row_object(row, path, number), str(path), str(number), path.parent)

    with open_rows(path) as rows:
        yield from usable_samples(rows, parse, skipped, none)


@contextlib.contextmanager
def open_rows(path: Path) -> Iterator[Iterator[tuple[int, Any]]]:
    """Open the numbered lines of a JSON Lines file, or the elements of an array in a `.json` file.

    Raises:
        BadInput: It is not a file, cannot be read, or is not JSON.
    """
    fault = regular_file_fault(path)
    if fault is not None:
        reason = fault.what.replace("no such file", "No such file")
        raise BadInput(Fault(str(path), f"cannot be read: {reason}", _EXPECTED))
    raise_if_any(_encoding_faults(path))
    try:
        # Bytes that are not UTF-8 become surrogates, and only their own line cannot be used.
        # utf-8-sig drops the byte order mark that Windows programs write.
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            yield _rows(file, path)
    except OSError as error:
        raise BadInput(Fault(str(path), f"cannot be read: {error.strerror}", _EXPECTED)) from None


def _encoding_faults(path: Path) -> Iterator[Fault]:
    """Yield a fault when a file is not text in UTF-8 from its first bytes on."""
    with path.open("rb") as file:
        start = file.read(8)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            yield Fault(str(path), f"is compressed with {name}", "decompress it")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        yield Fault(str(path), "is UTF-16 text", "write the file in UTF-8")


def count_rows(path: Path, most: int) -> int:
    """Count the lines or elements of a file of `open_rows`, up to `most`."""
    with open_rows(path) as rows:
        return sum(1 for _ in itertools.islice(rows, most))


def row_object(row: Any, path: Path, number: int) -> dict[str, Any]:
    """Return a row of `open_rows` as an object; raises `BadInput` if it is none."""
    if isinstance(row, str):
        return _json_object(row, f"{path}: line {number}")
    if not isinstance(row, dict):
        what = f"is a JSON {json_kind(row)}, not an object"
        raise BadInput(Fault(f"{path}: element {number}", what, "one object per element"))
    return row


def _rows(file: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    """The numbered lines of a JSON Lines file, or the elements of a JSON array."""
    if _begins_with_array(file) and path.suffix.lower() != ".jsonl":
        yield from enumerate(_array(file, path), start=1)
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, line


def _begins_with_array(file: TextIO) -> bool:
    start = file.read(4096).lstrip()
    file.seek(0)
    return start.startswith("[")


def _array(file: TextIO, path: Path) -> list[Any]:
    try:
        rows = json.load(file)
    except (ValueError, RecursionError) as error:
        what = f"is not a JSON array: {shortened(error)}"
        raise BadInput(Fault(str(path), what, _EXPECTED)) from None
    return list(rows)


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        raise BadInput(Fault(where, "is not UTF-8 text", "write the file in UTF-8")) from None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = f"is not JSON: {shortened(error)}"
        raise BadInput(Fault(where, what, "one object per line")) from None
    if not isinstance(value, dict):
        what = f"is a JSON {json_kind(value)}, not an object"
        raise BadInput(Fault(where, what, "one object per line"))
    return value
