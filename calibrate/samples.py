"""Calibration samples: OpenAI chat messages with pictures and clips, read from files and datasets,
and checked.

Whatever a source calls its media, a `Sample` names them in one way only: `image_url` and
`video_url` parts whose URL is a `file://` or a base64 `data:` URL. So one sample feeds the forward
loop and, unchanged, a vLLM server.
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
_MEDIA = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
_PARTS = ("text", *_MEDIA)
_MIME = {"image": "image/png", "video": "video/mp4"}


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        id: Name of the sample, unique within its source.
        messages: OpenAI chat messages; `content` is text or a list of `text`, `image_url` and
            `video_url` parts.
        source: Where it came from: file, dataset or generator.
        answer: The expected answer, where the source knows one.
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
    """Counts the samples that could not be used; one source of bad samples must not end a run of
    hours.

    Attributes:
        limit: How many samples may be skipped before `add` raises; 0 raises on the first.
        faults: Why each was skipped.
    """

    limit: int = 0
    faults: list[Fault] = field(default_factory=list)
    samples: int = 0

    def add(self, *faults: Fault) -> None:
        """Count one skipped sample; raises `BadInput` with every fault so far once there are more
        than `limit`.
        """
        self.samples += 1
        self.faults += faults
        if self.samples > self.limit:
            summary = Fault(
                "sources",
                f"{self.samples} samples cannot be used, at most {self.limit} may be",
                "mend or remove those named below",
            )
            raise BadInput(*([summary, *self.faults] if self.samples > 1 else self.faults))


def media_bytes(url: str, where: str) -> bytes:
    """Return the bytes behind a local path, a `file://` URL or a base64 `data:` URL.

    Raises:
        BadInput: No such file, not base64, or a URL that would have to be fetched; `where` names
            the sample.
    """
    url = _local_url(url, Path.cwd(), where)
    if url.startswith("data:"):
        try:
            data = base64.b64decode(url.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise BadInput(
                Fault(where, f"data URL is not base64: {error}", "encode the file again")
            ) from None
    else:
        try:
            data = Path(url2pathname(urlsplit(url).path)).read_bytes()
        except OSError as error:
            raise BadInput(
                Fault(where, f"{url} cannot be read: {error.strerror}", "give an existing file")
            ) from None
    if not data:
        raise BadInput(Fault(where, f"{url[:60]} is empty", "copy the file again"))
    return data


def _local_url(url: object, base: Path, where: str) -> str:
    """Turn a path, `file://` or `data:` URL into one of the two URL forms; raises `BadInput` for
    any other.
    """
    if not isinstance(url, str) or not url or "\0" in url:
        raise BadInput(Fault(where, f"media URL is {url!r}", "give a path or a data: URL"))
    if url.startswith("data:"):
        if not url.partition(",")[0].endswith(";base64"):
            raise BadInput(
                Fault(where, f"data URL {url[:40]}… is not base64", "write data:TYPE;base64,DATA")
            )
        return url
    if url.startswith("file://"):
        return url
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", url):
        raise BadInput(
            Fault(
                where,
                f"{url[:200]} is not local; nothing is fetched",
                "download it and give its path",
            )
        )
    return (base / url).absolute().as_uri()


def sample_from_row(row: dict[str, Any], source: str, number: str, base: Path) -> Sample:
    name, answer = row.get("id"), row.get("answer")
    where = f"{source}: sample {number if name is None else name}"
    held = {kind: _column(row, kind) for kind in _MIME}
    counts = {kind: len(values) for kind, values in held.items()}
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadInput(
            Fault(where, f"messages is {messages!r:.60}", "give a non-empty list of chat messages")
        )
    checked = [_message(message, held, base, where) for message in messages]
    for kind, left in held.items():
        if left:
            what = f"{counts[kind]} {kind}s in its columns, {len(left)} of them without a part in messages"
            raise BadInput(
                Fault(where, what, f'write a {{"type": "{kind}"}} part where each belongs')
            )
    return Sample(
        number if name is None else str(name),
        checked,
        source,
        None if answer is None else str(answer),
    )


def _message(message: object, held: dict[str, list[Any]], base: Path, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        found = message.get("role") if isinstance(message, dict) else message
        raise BadInput(
            Fault(where, f"a message has role {found!r:.60}", f"choose from {', '.join(ROLES)}")
        )
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    if not isinstance(content, list) or not content:
        raise BadInput(
            Fault(where, f"a message has content {content!r:.60}", "give text or a list of parts")
        )
    return {
        "role": message["role"],
        "content": [_part(part, held, base, where) for part in content],
    }


def _part(part: object, held: dict[str, list[Any]], base: Path, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in _PARTS:
        raise BadInput(
            Fault(
                where, f"unknown content part {part!r:.80}", f"type is one of {', '.join(_PARTS)}"
            )
        )
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadInput(
                Fault(where, f"a text part holds {part.get('text')!r:.60}", "give a string")
            )
        return {"type": "text", "text": part["text"]}
    medium = _MEDIA[kind]
    value = part.get(kind)
    value = value.get("url") if isinstance(value, dict) and "url" in value else value
    if value is None:
        if not held[medium]:
            raise BadInput(
                Fault(
                    where, f"an {medium} part names no file", f"give {kind} or an {medium}s column"
                )
            )
        value = held[medium].pop(0)
    return {
        "type": f"{medium}_url",
        f"{medium}_url": {"url": _media_url(value, medium, base, where)},
    }


def _media_url(value: object, medium: str, base: Path, where: str) -> str:
    """URL of a path, a URL, or an undecoded `{"bytes", "path"}` cell of a dataset's image or video
    column.
    """
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return f"data:{_MIME[medium]};base64,{base64.b64encode(value['bytes']).decode()}"
    return _local_url(value.get("path") if isinstance(value, dict) else value, base, where)


def _column(row: dict[str, Any], kind: str) -> list[Any]:
    cell = row.get(f"{kind}s") if row.get(f"{kind}s") is not None else row.get(kind)
    return [] if cell is None else list(cell) if isinstance(cell, list | tuple) else [cell]


def usable_samples(
    rows: Iterable[tuple[int, Row]],
    build: Callable[[int, Row], Sample],
    skipped: Skipped,
    none: Fault,
) -> Iterator[Sample]:
    """The samples that can be built; the others go to `skipped`. Raises `none` when there is not
    one.
    """
    found, before = 0, skipped.samples
    for number, row in rows:
        try:
            sample = build(number, row)
        except BadInput as bad:
            skipped.add(*bad.faults)
            continue
        found += 1
        yield sample
    if not found:
        raise BadInput(none, *(skipped.faults if skipped.samples > before else []))
