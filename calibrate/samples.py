"""Calibration samples: OpenAI chat messages with pictures and clips, read from files and datasets, and checked.

Whatever a source calls its media, a `Sample` names them in one way only: `image_url` and `video_url` parts whose URL is
a `file://` or a base64 `data:` URL. So one sample feeds the forward loop and, unchanged, a vLLM server.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
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
        messages: OpenAI chat messages; `content` is text or a list of `text`, `image_url` and `video_url` parts.
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
    """Counts the samples that could not be used; one source of bad samples must not end a run of hours.

    Attributes:
        limit: How many samples may be skipped before `add` raises; 0 raises on the first.
        faults: Why each was skipped.
    """

    limit: int = 0
    faults: list[Fault] = field(default_factory=list)
    samples: int = 0

    def add(self, *faults: Fault) -> None:
        """Count one skipped sample; raises `BadInput` with every fault so far once there are more than `limit`."""
        self.samples += 1
        self.faults += faults
        if self.samples > self.limit:
            summary = Fault(
                "sources",
                f"{self.samples} samples cannot be used, at most {self.limit} may be",
                "mend or remove those named below",
            )
            raise BadInput(*([summary, *self.faults] if self.samples > 1 else self.faults))


def read_jsonl(path: str | Path, skipped: Skipped | None = None) -> Iterator[Sample]:
    """Yield the samples of a JSON Lines file, one object with `messages` a line.

    `id` and `answer` are taken over when there. Media are local paths relative to the file's directory, `file://`
    URLs or base64 `data:` URLs. Bad lines go to `skipped` (without one, the first raises).

    Raises:
        BadInput: The file is missing or holds no usable sample, or `skipped` is full.
    """
    path, skipped = Path(path), skipped if skipped is not None else Skipped()
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise BadInput(Fault(str(path), f"cannot be read: {error.strerror}", "give a JSON Lines file")) from None
    with file:
        lines = ((number, line) for number, line in _numbered_lines(file, path) if line.strip())
        none = Fault(str(path), "holds no usable sample", 'one {"messages": […]} a line')
        yield from _usable(
            lines,
            lambda n, line: _sample(_json_object(line, f"{path}: line {n}"), str(path), str(n), path.parent),
            skipped,
            none,
        )


def read_hub(
    name: str,
    *,
    split: str = "train",
    subset: str | None = None,
    streaming: bool = True,
    skipped: Skipped | None = None,
) -> Iterator[Sample]:
    """Yield the rows of a dataset on the Hugging Face Hub, or in a local directory, that has a `messages` column.

    Media stand in the parts themselves, as in JSON Lines, or in columns `images` or `image`, `videos` or `video`:
    then the n-th image part without a URL is the n-th image of its row, and there must be as many. Columns are not
    decoded: the original bytes travel on as `data:` URLs.

    Args:
        name: Name on the Hub, or a directory that `load_dataset` or `load_from_disk` reads.
        split: Which split.
        subset: The dataset's configuration, for those with several.
        streaming: Read rows as they come instead of downloading the dataset first.
        skipped: Takes the bad rows; without it the first raises.

    Raises:
        BadInput: The dataset cannot be opened or read, or holds no usable row, or `skipped` is full.
    """
    skipped = skipped if skipped is not None else Skipped()
    base = Path(name) if Path(name).is_dir() else Path.cwd()
    none = Fault(name, f"split {split} holds no usable sample", "it needs a messages column")
    rows = enumerate(_rows(name, split, subset, streaming))
    yield from _usable(rows, lambda number, row: _sample(row, name, str(number), base), skipped, none)


def media_bytes(url: str, where: str) -> bytes:
    """Return the bytes behind a local path, a `file://` URL or a base64 `data:` URL.

    Raises:
        BadInput: No such file, not base64, or a URL that would have to be fetched; `where` names the sample.
    """
    url = _local_url(url, Path.cwd(), where)
    if url.startswith("data:"):
        try:
            data = base64.b64decode(url.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise BadInput(Fault(where, f"data URL is not base64: {error}", "encode the file again")) from None
    else:
        try:
            data = Path(url2pathname(urlsplit(url).path)).read_bytes()
        except OSError as error:
            raise BadInput(Fault(where, f"{url} cannot be read: {error.strerror}", "give an existing file")) from None
    if not data:
        raise BadInput(Fault(where, f"{url[:60]} is empty", "copy the file again"))
    return data


def _usable(
    rows: Iterable[tuple[int, Row]], build: Callable[[int, Row], Sample], skipped: Skipped, none: Fault
) -> Iterator[Sample]:
    """The samples that can be built; the others go to `skipped`. Raises `none` when there is not one."""
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


def _local_url(url: object, base: Path, where: str) -> str:
    """Turn a path, `file://` or `data:` URL into one of the two URL forms; raises `BadInput` for any other."""
    if not isinstance(url, str) or not url or "\0" in url:
        raise BadInput(Fault(where, f"media URL is {url!r}", "give a path or a data: URL"))
    if url.startswith("data:"):
        if not url.partition(",")[0].endswith(";base64"):
            raise BadInput(Fault(where, f"data URL {url[:40]}… is not base64", "write data:TYPE;base64,DATA"))
        return url
    if url.startswith("file://"):
        return url
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", url):
        raise BadInput(Fault(where, f"{url[:200]} is not local; nothing is fetched", "download it and give its path"))
    return (base / url).absolute().as_uri()


def _sample(row: dict[str, Any], source: str, number: str, base: Path) -> Sample:
    name, answer = row.get("id"), row.get("answer")
    where = f"{source}: sample {number if name is None else name}"
    held = {kind: _column(row, kind) for kind in _MIME}
    counts = {kind: len(values) for kind, values in held.items()}
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadInput(Fault(where, f"messages is {messages!r:.60}", "give a non-empty list of chat messages"))
    checked = [_message(message, held, base, where) for message in messages]
    for kind, left in held.items():
        if left:
            what = f"{counts[kind]} {kind}s in its columns, {len(left)} of them without a part in messages"
            raise BadInput(Fault(where, what, f'write a {{"type": "{kind}"}} part where each belongs'))
    return Sample(number if name is None else str(name), checked, source, None if answer is None else str(answer))


def _message(message: object, held: dict[str, list[Any]], base: Path, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        found = message.get("role") if isinstance(message, dict) else message
        raise BadInput(Fault(where, f"a message has role {found!r:.60}", f"choose from {', '.join(ROLES)}"))
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    if not isinstance(content, list) or not content:
        raise BadInput(Fault(where, f"a message has content {content!r:.60}", "give text or a list of parts"))
    return {"role": message["role"], "content": [_part(part, held, base, where) for part in content]}


def _part(part: object, held: dict[str, list[Any]], base: Path, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in _PARTS:
        raise BadInput(Fault(where, f"unknown content part {part!r:.80}", f"type is one of {', '.join(_PARTS)}"))
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadInput(Fault(where, f"a text part holds {part.get('text')!r:.60}", "give a string"))
        return {"type": "text", "text": part["text"]}
    medium = _MEDIA[kind]
    value = part.get(kind)
    value = value.get("url") if isinstance(value, dict) and "url" in value else value
    if value is None:
        if not held[medium]:
            raise BadInput(Fault(where, f"an {medium} part names no file", f"give {kind} or an {medium}s column"))
        value = held[medium].pop(0)
    return {"type": f"{medium}_url", f"{medium}_url": {"url": _media_url(value, medium, base, where)}}


def _media_url(value: object, medium: str, base: Path, where: str) -> str:
    """URL of a path, a URL, or an undecoded `{"bytes", "path"}` cell of a dataset's image or video column."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return f"data:{_MIME[medium]};base64,{base64.b64encode(value['bytes']).decode()}"
    return _local_url(value.get("path") if isinstance(value, dict) else value, base, where)


def _column(row: dict[str, Any], kind: str) -> list[Any]:
    cell = row.get(f"{kind}s") if row.get(f"{kind}s") is not None else row.get(kind)
    return [] if cell is None else list(cell) if isinstance(cell, list | tuple) else [cell]


def _numbered_lines(file: Iterable[str], path: Path) -> Iterator[tuple[int, str]]:
    try:
        yield from enumerate(file, start=1)
    except (UnicodeDecodeError, OSError) as error:
        raise BadInput(Fault(str(path), f"cannot be read as UTF-8 text: {error}", "give a JSON Lines file")) from None


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadInput(Fault(where, f"is not JSON: {error}", "one object a line")) from None
    if not isinstance(value, dict):
        raise BadInput(Fault(where, f"holds a {type(value).__name__}, not an object", "one object a line"))
    return value


def _rows(name: str, split: str, subset: str | None, streaming: bool) -> Iterator[dict[str, Any]]:
    import datasets  # slow to import, and JSON Lines do without

    # Anything may come out of a dataset's own files and of the network behind them; all of it is bad input here.
    try:
        if (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists():
            data = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(name, subset, split=split, streaming=streaming)
        rows = data if isinstance(data, datasets.IterableDataset) else data.to_iterable_dataset()
        if rows.features is not None:
            rows = rows.cast(_undecoded(rows.features))
        iterator = iter(rows)
        while True:
            try:
                row = next(iterator)
            except StopIteration:
                return
            yield dict(row)
    except BadInput:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise BadInput(
            Fault(name, f"split {split} cannot be read: {reason}", "check name, split and network")
        ) from None


def _undecoded(feature: Any) -> Any:
    """The same features with media left as bytes. `decode(False)` would leave JSON columns undecoded as well."""
    import datasets

    if isinstance(feature, dict):
        return type(feature)({key: _undecoded(value) for key, value in feature.items()})
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_undecoded(feature.feature))
    return replace(feature, decode=False) if isinstance(feature, datasets.Image | datasets.Video) else feature
