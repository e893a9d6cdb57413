"""Samples: OpenAI chat messages with images and clips, converted from a source's rows and checked.

Whatever a source calls its media, a `Sample` names them in one way: `image_url` and `video_url`
parts whose URL is a `file://` or a base64 `data:` URL. So one sample serves the forward loop and,
unchanged, a vLLM server.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from checkpoint.faults import BadInput, Fault

Row = TypeVar("Row")
ROLES = ("system", "user", "assistant")
_MEDIUM_BY_TYPE = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
_PART_TYPES = ("text", *_MEDIUM_BY_TYPE)
_MIME = {"image": "image/png", "video": "video/mp4"}


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        id: Name of the sample, unique within its source.
        messages: OpenAI chat messages; `content` is text or a list of `text`, `image_url` and
            `video_url` parts.
        source: Where it came from: file, dataset or generator.
        answer: The expected answer, if the source knows one.
    """

    id: str
    messages: list[dict[str, Any]]
    source: str
    answer: str | None = None

    @property
    def where(self) -> str:
        """How faults name this sample."""
        return f"{self.source}: sample {self.id}"


@dataclass
class Skipped:
    """Counts the samples that could not be used.

    Attributes:
        limit: How many samples may be skipped before `add` raises; with 0 the first one raises.
        faults: Why each was skipped.
        samples: How many were skipped.
    """

    limit: int = 0
    faults: list[Fault] = field(default_factory=list)
    samples: int = 0

    def add(self, *faults: Fault) -> None:
        """Count one skipped sample.

        Raises:
            BadInput: With every fault so far, once there are more samples than `limit`.
        """
        self.samples += 1
        self.faults.extend(faults)
        if self.samples <= self.limit:
            return
        if self.samples == 1:
            raise BadInput(*self.faults)
        what = f"{self.samples} samples cannot be used, at most {self.limit} may be skipped"
        summary = Fault("sources", what, "fix or remove those named below")
        raise BadInput(summary, *self.faults)


UNLIMITED = 2**31
"""A limit on skipped samples that is never reached."""


def media_bytes(url: str, where: str) -> bytes:
    """Return the bytes behind a local path, a `file://` URL or a base64 `data:` URL.

    Args:
        url: The path or URL.
        where: Names the sample in faults.

    Raises:
        BadInput: The file does not exist, the data is not base64, or the URL is not local.
    """
    url = _local_url(url, Path.cwd(), where)
    if url.startswith("data:"):
        data = _decode_base64(url, where)
    else:
        path = Path(url2pathname(urlsplit(url).path))
        try:
            data = path.read_bytes()
        except OSError as error:
            what = f"{url[:200]} cannot be read: {error.strerror}"
            raise BadInput(Fault(where, what, "give an existing file")) from None
    if not data:
        raise BadInput(Fault(where, f"{url[:60]} is empty", "copy the file again"))
    return data


def _decode_base64(url: str, where: str) -> bytes:
    encoded = url.partition(",")[2]
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        what = f"data URL is not base64: {error}"
        raise BadInput(Fault(where, what, "encode the file again")) from None


def _local_url(url: object, base: Path, where: str) -> str:
    """Return a path or URL as a `file://` or `data:` URL; raises `BadInput` for any other."""
    if not isinstance(url, str) or not url or "\0" in url:
        what = f"media URL is {str(url)[:200]!r}"
        raise BadInput(Fault(where, what, "give a path or a data: URL"))
    if url.startswith("data:"):
        if not url.partition(",")[0].endswith(";base64"):
            what = f"data URL {url[:40]}… is not base64"
            raise BadInput(Fault(where, what, "write data:TYPE;base64,DATA"))
        return url
    if url.startswith("file://"):
        return url
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", url):
        what = f"{url[:200]} is not local, and nothing is downloaded"
        raise BadInput(Fault(where, what, "download it and give its path"))
    return (base / url).absolute().as_uri()


def usable_samples(
    rows: Iterable[tuple[int, Row]],
    parse: Callable[[int, Row], Sample],
    skipped: Skipped,
    none: Fault,
) -> Iterator[Sample]:
    """Yield the samples that can be parsed; the others go to `skipped`.

    Args:
        rows: The source's rows with their numbers.
        parse: Makes a sample of a row, or raises `BadInput`.
        skipped: Takes the faults of the others.
        none: The fault to raise if no row could be parsed.

    Raises:
        BadInput: `skipped` is full, or there is no usable row.
    """
    found = 0
    skipped_before = skipped.samples
    for number, row in rows:
        try:
            sample = parse(number, row)
        except BadInput as bad:
            skipped.add(*bad.faults)
            continue
        found += 1
        yield sample
    if found == 0:
        reasons = skipped.faults if skipped.samples > skipped_before else []
        raise BadInput(none, *reasons)


def sample_from_row(row: dict[str, Any], source: str, number: str, base: Path) -> Sample:
    """Convert a source's row into a sample.

    Args:
        row: With `messages`, and optionally `id`, `answer` and columns of media.
        source: Name of the source.
        number: Number of the row; the sample's id if it has none.
        base: Directory that relative media paths refer to.

    Raises:
        BadInput: A message, a part or a medium is not valid.
    """
    identifier = number if row.get("id") is None else str(row["id"])
    answer = None if row.get("answer") is None else str(row["answer"])
    where = f"{source}: sample {identifier}"
    converter = _RowConverter(row, base, where)
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        what = f"messages is {messages!r:.60}"
        raise BadInput(Fault(where, what, "give a non-empty list of chat messages"))
    converted = [converter.message(message) for message in messages]
    converter.check_all_used()
    return Sample(identifier, converted, source, answer)


class _RowConverter:
    """Converts the messages of one row; parts without a URL take the next medium of the columns."""

    def __init__(self, row: dict[str, Any], base: Path, where: str) -> None:
        self._base = base
        self._where = where
        self._columns = {medium: _column(row, medium) for medium in _MIME}
        self._counts = {medium: len(values) for medium, values in self._columns.items()}

    def message(self, message: object) -> dict[str, Any]:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            found = message.get("role") if isinstance(message, dict) else message
            what = f"a message has role {found!r:.60}"
            raise BadInput(Fault(self._where, what, f"choose from {', '.join(ROLES)}"))
        content = message.get("content")
        if isinstance(content, str):
            return {"role": message["role"], "content": content}
        if not isinstance(content, list) or not content:
            what = f"a message has content {content!r:.60}"
            raise BadInput(Fault(self._where, what, "give text or a list of parts"))
        return {"role": message["role"], "content": [self._part(part) for part in content]}

    def _part(self, part: object) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind not in _PART_TYPES:
            what = f"unknown content part {part!r:.80}"
            raise BadInput(Fault(self._where, what, f"type is one of {', '.join(_PART_TYPES)}"))
        if kind == "text":
            return {"type": "text", "text": self._text(part)}
        medium = _MEDIUM_BY_TYPE[kind]
        value = part.get(kind)
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        if value is None:
            value = self._next_medium(kind, medium)
        url = self._media_url(value, medium)
        return {"type": f"{medium}_url", f"{medium}_url": {"url": url}}

    def _text(self, part: dict[str, Any]) -> str:
        text = part.get("text")
        if not isinstance(text, str):
            what = f"a text part contains {text!r:.60}"
            raise BadInput(Fault(self._where, what, "give a string"))
        return text

    def _next_medium(self, kind: str, medium: str) -> Any:
        if not self._columns[medium]:
            what = f"an {medium} part names no file"
            raise BadInput(Fault(self._where, what, f"give {kind} or an {medium}s column"))
        return self._columns[medium].pop(0)

    def _media_url(self, value: object, medium: str) -> str:
        """URL of a path, a URL, or an undecoded `{"bytes", "path"}` cell of a dataset's column."""
        if not isinstance(value, dict):
            return _local_url(value, self._base, self._where)
        data = value.get("bytes")
        if isinstance(data, bytes):
            encoded = base64.b64encode(data).decode()
            return f"data:{_MIME[medium]};base64,{encoded}"
        return _local_url(value.get("path"), self._base, self._where)

    def check_all_used(self) -> None:
        """Refuse a row whose columns hold more media than its messages have parts for."""
        for medium, left in self._columns.items():
            if left:
                total = self._counts[medium]
                what = f"{total} {medium}s in its columns, {len(left)} without a part in messages"
                remedy = f'write a {{"type": "{medium}"}} part where each belongs'
                raise BadInput(Fault(self._where, what, remedy))


def _column(row: dict[str, Any], medium: str) -> list[Any]:
    """The media in a row's columns, such as `images` or `image`."""
    cell = row.get(f"{medium}s")
    if cell is None:
        cell = row.get(medium)
    if cell is None:
        return []
    if isinstance(cell, list | tuple):
        return list(cell)
    return [cell]
