"""Starts a worker in the harnesses' environment and asks it for prompts and scores."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from accuracy.suites.catalogue import Task
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.log import get_logger

logger = get_logger(__name__)

VARIABLE = "HYBRIDQUANT_EVAL_PYTHON"
_REPOSITORY = Path(__file__).parents[2]
_WORKERS = Path(__file__).parent / "workers"
_FILES = {"vlmeval": "vlm_worker.py", "lm-eval": "text_worker.py"}


class HarnessFailed(Exception):
    """A harness ended with an error that is not of the data; the message names its log."""


@dataclass(frozen=True)
class Item:
    """One item of a task.

    Attributes:
        id: Its name in the data set.
        group: What the data set averages over first; empty where it averages over items.
        part: A part of the task whose figure is shown by itself; empty where there are none.
    """

    id: str
    group: str = ""
    part: str = ""


@dataclass(frozen=True)
class PromptText:
    """What an item asks.

    Attributes:
        messages: OpenAI messages; a part of a picture or a clip has a `path`.
        stop: Stop sequences.
        max_tokens: Most tokens of the answer, where the task says so.
    """

    messages: list[dict[str, Any]]
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None


@dataclass(frozen=True)
class Scored:
    """A harness's scores.

    Attributes:
        scores: Between 0 and 1, by item.
        overall: The data set's own figure over these items, in percent.
        unscored: Items that the judge failed to read.
    """

    scores: dict[str, float]
    overall: float
    unscored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judge:
    """A model that reads answers, behind an OpenAI-compatible endpoint.

    Attributes:
        url: Its base URL, with or without `/v1`.
        model: The model's name there.
        key: Its key.
    """

    url: str
    model: str
    key: str

    def as_request(self) -> dict[str, str]:
        """As the worker takes it: VLMEvalKit wants the whole address."""
        root = self.url.rstrip("/")
        if not root.endswith("/v1"):
            root += "/v1"
        return {"url": f"{root}/chat/completions", "model": self.model, "key": self.key}


@dataclass(frozen=True)
class DataSource:
    """Where the data is.

    Attributes:
        folder: VLMEvalKit's folder of tables; below it, `hub` may be a cache of the Hub.
        is_own: Whether data with another checksum than the published is taken.
        tasks_folder: The user's own task files for lm-eval.
        limit: Items per task; None for all. lm-eval needs it to build no more prompts.
    """

    folder: Path
    is_own: bool = False
    tasks_folder: Path | None = None
    limit: int | None = None


class OpenTask(Protocol):
    """A task whose items can be asked and scored."""

    items: tuple[Item, ...]
    media_root: Path | None
    data: str

    def prompt(self, item: Item) -> PromptText:
        """Return what an item asks."""

    def score(self, answers: Mapping[str, str], judge: Judge | None) -> Scored:
        """Score answers by item."""

    def close(self) -> None:
        """Release what the task holds."""


def find_python() -> Path:
    """Return the interpreter that has the harnesses.

    Raises:
        BadInput: There is none.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not os.access(named, os.X_OK):
            remedy = "give the path of a python with ms-vlmeval and lm-eval"
            raise BadInput(Fault(f"{VARIABLE}={shortened(named)}", "is not an interpreter", remedy))
        return Path(named)
    beside = _REPOSITORY / ".venv-eval" / "bin" / "python"
    if beside.exists():
        return beside
    remedy = f"set {VARIABLE} to a python with ms-vlmeval and lm-eval (requirements-eval.txt)"
    if (_REPOSITORY / "Makefile").exists():
        remedy = f"run make setup-eval, or {remedy}"
    raise BadInput(Fault("the benchmark harnesses", "are not installed", remedy))


class HarnessTask:
    """A task of VLMEvalKit or lm-eval, open in a worker process.

    Attributes:
        items: The items, in the data's order, at most `limit`.
        media_root: Folder of the clips; None without clips.
        data: Hash of the data: answers to other data are not taken for answers to these.
    """

    def __init__(self, task: Task, source: DataSource, log: Path) -> None:
        """Start the worker and load the data.

        Raises:
            BadInput: The harnesses, the task or its data are missing.
            HarnessFailed: The harness failed.
        """
        self._task = task
        self._log = log
        self._turn = threading.Lock()
        command = [str(find_python()), "-E", str(_WORKERS / _FILES[task.harness])]
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
            )
        try:
            opened = self._ask(
                do="open",
                dataset=task.dataset,
                data=str(source.folder.absolute()),
                is_own_data=source.is_own,
                limit=source.limit,
                tasks_folder=_text(source.tasks_folder),
            )
        except BaseException:
            self.close()
            raise
        items = [Item(entry["id"], entry["group"]) for entry in opened["items"]]
        # lm-eval has applied the limit to each task of a group.
        self.items = tuple(items) if task.harness == "lm-eval" else sample(items, source.limit)
        root = opened["media_root"]
        self.media_root = None if root is None else Path(root)
        self.data = str(opened["data"])

    def prompt(self, item: Item) -> PromptText:
        """Return what an item asks.

        Raises:
            HarnessFailed: The harness failed.
        """
        built = self._ask(do="prompt", item=item.id)
        stop = tuple(built.get("stop", ()))
        return PromptText(built["messages"], stop, built.get("max_tokens"))

    def score(self, answers: Mapping[str, str], judge: Judge | None = None) -> Scored:
        """Score answers by item.

        Raises:
            BadInput: Something that scoring needs is missing.
            HarnessFailed: The harness failed.
        """
        request = None if judge is None else judge.as_request()
        scored = self._ask(do="score", answers=dict(answers), judge=request)
        return Scored(scored["scores"], scored["overall"], tuple(scored["unscored"]))

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> HarnessTask:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._turn:
            try:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = ""
        if not line:
            raise HarnessFailed(f"{self._task.name}: the harness ended; see {self._log}")
        reply = json.loads(line)
        if "result" in reply:
            return reply["result"]
        reason = shortened(reply["error"], 400)
        if reply["is_data"]:
            raise BadInput(Fault(self._task.name, reason))
        raise HarnessFailed(f"{self._task.name}: {reason}; see {self._log}")


def sample(items: Sequence[Item], limit: int | None) -> tuple[Item, ...]:
    """Return at most `limit` items: always the same, a larger limit holds a smaller one's.

    The first ones would be of one category: MMMU, for one, is sorted by subject.
    """
    if limit is None or limit >= len(items):
        return tuple(items)

    def drawn(item: Item) -> str:
        return hashlib.sha256(item.id.encode()).hexdigest()

    return tuple(sorted(items, key=drawn)[:limit])


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())
