"""LLaVA and ShareGPT rows: `conversations` of `from` and `value`, with `<image>` in the text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from calibrate.samples import Sample, Skipped, sample_from_row, usable_samples
from calibrate.sources.hub import count_dataset, dataset_rows, local_files
from calibrate.sources.jsonl import count_rows, open_rows, row_object
from calibrate.sources.source import Source, file_or_folder_faults, register_source
from checkpoint.faults import BadInput, Fault, shortened

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_MARKUP = "<tool_response>"
"""What some data sets write around results, and the template would write again."""

_MARKER = re.compile(r"<(image|video)>")


@register_source
class LlavaSource(Source):
    """LLaVA rows with `<image>` or `<video>` in the text: JSON, JSON Lines, Parquet or a folder."""

    type: Literal["llava"]
    path: Path
    """The file, or a folder that `load_dataset` reads."""
    media: Path | None = None
    """Directory that the rows' media paths are relative to; by default that of the file."""

    def read(self, samples: int, seed: int, skipped: Skipped) -> Iterator[Sample]:
        """Yield the samples of the file, in order."""
        none = Fault(str(self.path), "contains no usable sample", "it needs conversations")
        if self._is_dataset:
            rows: Iterator[tuple[int, Any]] = enumerate(dataset_rows(str(self.path)), start=1)
            yield from usable_samples(rows, self._sample, skipped, none)
            return
        with open_rows(self.path) as rows:
            yield from usable_samples(rows, self._sample, skipped, none)

    def count(self, samples: int) -> int:
        """Rows, at most `samples`."""
        if self._is_dataset:
            return count_dataset(str(self.path), samples)
        return count_rows(self.path, samples)

    def faults(self) -> Iterator[Fault]:
        """Yield a fault when there is no such file or folder."""
        yield from file_or_folder_faults(self.path)

    def files(self) -> list[Path]:
        """The file itself, or those of the folder."""
        return local_files(self.path)

    @property
    def _is_dataset(self) -> bool:
        return self.path.is_dir() or self.path.suffix.lower() == ".parquet"

    def _sample(self, number: int, row: Any) -> Sample:
        row = row_object(row, self.path, number)
        where = f"{self.path}: sample {number}"
        converted = {key: value for key, value in row.items() if key != "conversations"}
        turns = row.get("conversations") or row.get("messages")
        if not isinstance(turns, list) or not turns:
            what = f"conversations is {shortened(turns, 60)}"
            raise BadInput(Fault(where, what, "give a non-empty list of turns"))
        converted["messages"] = [_message(turn, where) for turn in turns]
        if isinstance(row.get("tools"), str):
            converted["tools"] = _tools(row["tools"], where)
        base = self.path if self.path.is_dir() else self.path.parent
        return sample_from_row(converted, str(self.path), str(number), self.media or base)


@register_source
class ShareGptSource(LlavaSource):
    """ShareGPT rows, which are read as those of LLaVA."""

    type: Literal["sharegpt"]  # type: ignore[assignment]


def _message(turn: object, where: str) -> dict[str, Any]:
    """A turn as a chat message; each marker becomes a part that takes the row's next medium."""
    fields = turn if isinstance(turn, dict) else {}
    given = fields.get("from") or fields.get("role")
    text = fields.get("value") if fields.get("value") is not None else fields.get("content")
    if given not in _ROLES or not isinstance(text, str):
        what = f"a turn is {shortened(turn, 80)}"
        raise BadInput(Fault(where, what, f"give text from one of {', '.join(_ROLES)}"))
    unknown = set(fields) - {"from", "role", "value", "content", "weight"}
    if unknown:
        what = f"fields {shortened(sorted(unknown), 80)} of a turn would be lost"
        raise BadInput(Fault(where, what, "remove them, or the sample"))
    role = _ROLES[str(given)]
    if role == "tool" and text.lstrip().startswith(_MARKUP):
        what = f"a turn is {shortened(text, 60)}, with markup that the template writes itself"
        raise BadInput(Fault(where, what, "leave the result alone in the turn"))
    if given == "function_call":
        return {"role": role, "content": "", "tool_calls": _calls(text, where)}
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(_MARKER.split(text)):
        if number % 2:  # every second piece is a marker's name
            parts.append({"type": piece})
        elif piece:
            parts.append({"type": "text", "text": piece})
    content: str | list[dict[str, Any]] = parts if len(parts) > 1 or "<" in text else text
    return {"role": role, "content": content}


def _calls(text: str, where: str) -> list[dict[str, Any]]:
    """The calls of a turn `function_call`: JSON of one or several with name and arguments."""
    calls = _parsed(text, "function_call", where)
    if isinstance(calls, dict):
        calls = [calls]
    for call in calls if isinstance(calls, list) else [None]:
        if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            what = f"a function_call is {shortened(text, 80)}"
            raise BadInput(Fault(where, what, 'write {"name": …, "arguments": {…}}'))
    return [{"type": "function", "function": call} for call in calls]


def _tools(text: str, where: str) -> Any:
    """The column `tools` of ShareGPT, a JSON text, as OpenAI writes it."""
    tools = _parsed(text, "tools", where) if text.strip() else []
    if not isinstance(tools, list):
        return tools
    wrapped = []
    for tool in tools:
        is_bare = isinstance(tool, dict) and "function" not in tool
        wrapped.append({"type": "function", "function": tool} if is_bare else tool)
    return wrapped


def _parsed(text: str, name: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        what = f"{name} is {shortened(text, 80)}"
        raise BadInput(Fault(where, what, "write it as JSON")) from None
