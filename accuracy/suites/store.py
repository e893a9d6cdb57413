"""Keeps requests and answers: one JSON object a line, appended, so that a run can be resumed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from checkpoint.faults import BadInput, Fault


@dataclass(frozen=True)
class Key:
    """What an answer is kept under, beside the model.

    Attributes:
        task: The task's name.
        item: The item's name.
        settings: Hash of everything else that decides the answer.
        repeat: 0, and 1 for the second time that the same server is asked.
    """

    task: str
    item: str
    settings: str
    repeat: int = 0


@dataclass(frozen=True)
class Reply:
    """What came back for a request.

    Attributes:
        answer: The text; None when the request failed.
        error: Why it failed; None when it did not.
        finish_reason: `length` when the answer was cut off.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens of the answer.
        seconds: From the request to the answer.
    """

    answer: str | None
    error: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


class AnswerStore:
    """The answers of one model, in a file.

    Every line is on the disk before `add` returns. A line that a kill left half written is cut
    off when the file is opened.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or create it.

        Raises:
            BadInput: A line of it is not an answer.
        """
        self.path = path
        self._turn = threading.Lock()
        self._replies: dict[Key, Reply] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if path.exists():
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.endswith(b"\n"):
                        break
                    whole += len(line)
                    self._remember(line, f"{path}: line {number}")
        self._file: BinaryIO = path.open("ab")
        self._file.truncate(whole)

    def get(self, key: Key) -> Reply | None:
        """Return what was kept under a key; None if nothing was."""
        return self._replies.get(key)

    def add(self, key: Key, messages: list[dict[str, Any]], reply: Reply) -> None:
        """Keep a request and what came back."""
        line = asdict(key) | {"messages": messages} | asdict(reply)
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        with self._turn:
            with self._naming_the_file():
                self._file.write(data)
                self._file.flush()
                os.fsync(self._file.fileno())
            self._replies[key] = reply

    def close(self) -> None:
        """Close the file."""
        with self._naming_the_file():  # what could not be written is tried once more
            self._file.close()

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Name the file in an error, such as that of a full disk: writing does not."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _remember(self, data: bytes, where: str) -> None:
        try:
            line = json.loads(data)
            key = Key(**{name: line[name] for name in Key.__dataclass_fields__})
            reply = Reply(**{name: line[name] for name in Reply.__dataclass_fields__})
        except (ValueError, TypeError, KeyError):
            remedy = "remove the line: its item is asked again"
            raise BadInput(Fault(where, "is not an answer that was kept", remedy)) from None
        self._replies[key] = reply


def settings_hash(**settings: Any) -> str:
    """Return a hash of settings, independent of their order."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
