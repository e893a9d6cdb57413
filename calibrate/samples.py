"""Samples: OpenAI chat messages with images and clips, converted from a source's rows and checked.

Whatever a source calls its media, a `Sample` names them in one way: `image_url` and `video_url`
parts whose URL is a `file://` or a base64 `data:` URL. So one sample serves the forward loop and,
unchanged, a vLLM server.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from calibrate.media_urls import local_file, local_url
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.memory import is_out_of_memory

Row = TypeVar("Row")
ROLES = ("system", "user", "assistant", "tool")
_MEDIUM_BY_TYPE = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
_PART_TYPES = ("text", *_MEDIUM_BY_TYPE)
_MIME = {"image": "image/png", "video": "video/mp4"}
_FIELDS = {
    "assistant": ("tool_calls", "reasoning", "reasoning_content", "name"),
    "tool": ("tool_call_id", "name"),
    "user": ("name",),
    "system": ("name",),
}
"""Fields of a message besides `role` and `content`, by role: those that vLLM gives the template."""

_TEMPLATE_COLUMNS = ("documents", "functions", "chat_template_kwargs", "reasoning_effort")
"""Columns of a row that a server would give the template, and that are not read here."""


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        id: Name of the sample, unique within its source.
        messages: OpenAI chat messages; `content` is text or a list of `text`, `image_url` and
            `video_url` parts.
        source: Where it came from: file, dataset or generator.
        answer: The expected answer, if the source knows one.
        tools: The functions that the assistant may call, as vLLM gives them to the template.
    """

    id: str
    messages: list[dict[str, Any]]
    source: str
    answer: str | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def where(self) -> str:
        """How faults name this sample."""
        return f"{self.source}: sample {shortened(self.id, 80)}"

    def media_files(self) -> Iterator[Path]:
        """Yield the files of its pictures and clips; what stands in the row itself has none."""
        for message in self.messages:
            parts = message["content"]
            for part in parts if isinstance(parts, list) else []:
                if part["type"] != "text":
                    path = local_file(part[part["type"]]["url"])
                    if path is not None:
                        yield path


@contextlib.contextmanager
def faults_of_sample(where: str) -> Iterator[None]:
    """Turn whatever building one sample raises into a fault that names the sample.

    Libraries raise nearly anything on a strange file or text. Lack of memory is not the sample's.

    Args:
        where: Names the sample.

    Raises:
        BadInput: The body raised an exception other than for lack of memory.
    """
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        what = f"cannot be used: {type(error).__name__}: {shortened(error)}"
        raise BadInput(Fault(where, what, "fix or remove the sample")) from error


@dataclass
class Skipped:
    """Counts the samples that could not be used.

    Attributes:
        limit: How many samples may be skipped before `add` raises; with 0 the first one raises.
        repeats: Whether samples are read several times, as a training does: then the same faults
            are counted once.
        faults: Why each was skipped.
        samples: How many were skipped.
    """

    limit: int = 0
    repeats: bool = False
    faults: list[Fault] = field(default_factory=list)
    samples: int = 0

    def add(self, *faults: Fault) -> None:
        """Count one skipped sample.

        Raises:
            BadInput: With every fault so far, once there are more samples than `limit`.
        """
        if self.repeats and set(faults) <= set(self.faults):
            return
        self.samples += 1
        self.faults.extend(faults)
        if self.samples <= self.limit:
            return
        if self.samples == 1:
            raise BadInput(*self.faults)
        what = f"{self.samples} samples cannot be used, at most {self.limit} may be skipped"
        summary = Fault("sources", what, "fix or remove those named below")
        raise BadInput(summary, *self.faults)


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
            with faults_of_sample(f"{none.where}: row {number}"):
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
    answer = row.get("answer")
    # Some datasets have lists of answers, of which none is the expected one.
    answer = str(answer) if isinstance(answer, str | int | float) else None
    where = f"{source}: sample {shortened(identifier, 80)}"
    converter = _RowConverter(row, base, where)
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        what = f"messages is {messages!r:.60}"
        remedy = "give a non-empty list of chat messages"
        if row.get("conversations"):
            what = "has `conversations` in place of `messages`"
            remedy = "give the source the type llava, which reads LLaVA and ShareGPT rows"
        raise BadInput(Fault(where, what, remedy))
    for column in _TEMPLATE_COLUMNS:
        if row.get(column):
            what = f"{column} would be lost: it is not read"
            raise BadInput(Fault(where, what, "remove it, or the sample"))
    converted = [converter.message(message) for message in messages]
    converter.check_all_used()
    tools = _tools(row.get("tools"), where)
    sample = Sample(identifier, converted, source, answer, tools)
    _check_encodable([sample.messages, tools, answer, identifier], where)
    return sample


def _check_encodable(parts: list[Any], where: str) -> None:
    """Refuse half of a surrogate pair, which JSON may contain and UTF-8 cannot."""
    try:
        json.dumps(parts, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        what = "text contains half of a surrogate pair, which is no character"
        raise BadInput(Fault(where, what, "write the text again in UTF-8")) from None


def _tools(value: object, where: str) -> list[dict[str, Any]] | None:
    """The functions that may be called, with the keys and the order that vLLM gives the template.

    (vllm/entrypoints/generate/base/protocol.py, FunctionDefinition.)
    """
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        what = f"tools is a {type(value).__name__}, not a list of functions"
        raise BadInput(Fault(where, what, "write them as OpenAI does"))
    tools = []
    for tool in value:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            what = f"tools contains {shortened(tool, 60)}, not a function with a name"
            raise BadInput(Fault(where, what, "write it as OpenAI does"))
        unknown = set(tool) - {"type", "function"}
        unknown |= set(function) - {"name", "description", "parameters", "strict"}
        if unknown or tool.get("type", "function") != "function":
            what = f"a tool has {shortened(sorted(unknown) or tool.get('type'), 60)}"
            raise BadInput(Fault(where, what, "give type function, name, description, parameters"))
        kept = {key: function.get(key) for key in ("name", "description", "parameters")}
        if function.get("strict") is not None:
            kept["strict"] = function["strict"]
        tools.append({"type": "function", "function": kept})
    return tools


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
        extra = self._extra_fields(message)
        content = message.get("content")
        if content is None and ("tool_calls" in extra or "reasoning" in extra):
            return {"role": message["role"], "content": "", **extra}
        if isinstance(content, str):
            return {"role": message["role"], "content": content, **extra}
        if not isinstance(content, list) or not content:
            what = f"a message has content {content!r:.60}"
            raise BadInput(Fault(self._where, what, "give text or a list of parts"))
        parts = [self._part(part) for part in content]
        return {"role": message["role"], "content": parts, **extra}

    def _extra_fields(self, message: dict[str, Any]) -> dict[str, Any]:
        """The fields that vLLM hands on to the template; any other is refused by name."""
        role = message["role"]
        extra = {}
        for key, value in message.items():
            if key in ("role", "content") or value is None or value == [] or value == "":
                continue
            if key not in _FIELDS[role]:
                what = f"field {shortened(key, 60)} of a message of the {role} would be lost"
                raise BadInput(Fault(self._where, what, "remove it, or the sample"))
            extra["reasoning" if key == "reasoning_content" else key] = value
        if "tool_calls" in extra:
            extra["tool_calls"] = self._tool_calls(extra["tool_calls"])
        for key in ("reasoning", "name", "tool_call_id"):
            if not isinstance(extra.get(key, ""), str):
                what = f"{key} of a message is {shortened(extra[key], 60)}"
                raise BadInput(Fault(self._where, what, "give a string"))
        return extra

    def _tool_calls(self, calls: object) -> list[dict[str, Any]]:
        """Calls of functions as OpenAI writes them: the arguments are a JSON object, or its text.

        The arguments become an object for the template, as in vLLM, when the prompt is built.
        """
        if not isinstance(calls, list):
            what = f"tool_calls is {shortened(calls, 60)}"
            raise BadInput(Fault(self._where, what, "give a list"))
        for call in calls:
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict) or call.get("type", "function") != "function":
                what = f"tool_calls contains {shortened(call, 60)}, not a call of a function"
                raise BadInput(Fault(self._where, what, "write it as OpenAI does"))
            arguments = function.get("arguments") or {}
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments)
                except (ValueError, RecursionError):
                    arguments = None
            if not isinstance(arguments, dict):
                found = shortened(function.get("arguments"), 60)
                what = f"arguments of a tool call are {found}, not a JSON object"
                raise BadInput(
                    Fault(self._where, what, "a server would drop them: write an object")
                )
        return copy.deepcopy(calls)

    def _part(self, part: object) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind not in _PART_TYPES:
            what = f"unknown content part {part!r:.80}"
            raise BadInput(Fault(self._where, what, f"type is one of {', '.join(_PART_TYPES)}"))
        if kind == "text":
            self._check_part_fields(part, ("text",))
            return {"type": "text", "text": self._text(part)}
        medium = _MEDIUM_BY_TYPE[kind]
        names = (medium, f"{medium}_url", "url", "path", "base64")
        self._check_part_fields(part, (*names, "detail"))
        given = [name for name in names if part.get(name) is not None]
        if len(given) > 1:
            what = f"a part of type {kind} has both {given[0]} and {given[1]}"
            raise BadInput(Fault(self._where, what, "give one of them"))
        value = part[given[0]] if given else None
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        if value is None:
            value = self._next_medium(kind, medium)
        elif given == ["base64"] and isinstance(value, str) and value[:5].lower() != "data:":
            value = f"data:{_MIME[medium]};base64,{value}"
        url = self._media_url(value, medium)
        return {"type": f"{medium}_url", f"{medium}_url": {"url": url}}

    def _check_part_fields(self, part: dict[str, Any], known: tuple[str, ...]) -> None:
        """Refuse fields that would be lost, such as the frames per second of one clip."""
        for key, value in part.items():
            if key != "type" and key not in known and value is not None:
                what = f"field {shortened(key, 60)} of a part of type {part['type']} would be lost"
                raise BadInput(Fault(self._where, what, "remove it, or the sample"))

    def _text(self, part: dict[str, Any]) -> str:
        text = part.get("text")
        if not isinstance(text, str):
            what = f"a text part contains {text!r:.60}"
            raise BadInput(Fault(self._where, what, "give a string"))
        return text

    def _next_medium(self, kind: str, medium: str) -> Any:
        if not self._columns[medium]:
            what = f"a part of type {medium} names no file"
            raise BadInput(Fault(self._where, what, f"give {kind}, or a column {medium}s"))
        return self._columns[medium].pop(0)

    def _media_url(self, value: object, medium: str) -> str:
        """URL of a path, a URL, or an undecoded `{"bytes", "path"}` cell of a dataset's column."""
        if not isinstance(value, dict):
            return local_url(value, self._base, self._where)
        data = value.get("bytes")
        if isinstance(data, bytes):
            encoded = base64.b64encode(data).decode()
            return f"data:{_MIME[medium]};base64,{encoded}"
        return local_url(value.get("path"), self._base, self._where)

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
