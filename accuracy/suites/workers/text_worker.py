"""Builds the prompts and scores the answers of one text task with lm-eval.

    .venv-eval/bin/python text_worker.py

Runs in the harnesses' environment (`make setup-eval`); see worker_protocol.py for the protocol.
lm-eval is given a model that writes down what it is asked, as the messages that its own
`local-chat-completions` would send, and then one that knows the answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from worker_protocol import DataError, serve_requests

PREFERRED_FILTER = "flexible-extract"
"""Of a task with several readings of an answer, the one that forgives how it is written."""

_MOST_STOPS = 4
"""Stop sequences that lm-eval sends to a chat endpoint."""


class Carried(LM):
    """A model whose answers come from elsewhere.

    Attributes:
        answers: By the item's name.
        asked: Prompts by the item's name, filled when the model is asked.
    """

    def __init__(self, answers: Mapping[str, str]) -> None:
        super().__init__()
        self.answers = answers
        self.asked: dict[str, dict[str, Any]] = {}

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the known answers, an empty one where none is known."""
        found = []
        for request in requests:
            messages, options = request.args
            item = f"{request.task_name}/{request.doc_id}"
            stops = options.get("until") or []
            if isinstance(stops, str):
                stops = [stops]
            self.asked[item] = {
                "messages": json.loads(messages),
                "stop": list(stops)[:_MOST_STOPS],
                "max_tokens": options.get("max_tokens") or options.get("max_gen_toks"),
            }
            found.append(self.answers.get(item, ""))
        return found

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """A chat endpoint gives no probabilities of a prompt."""
        raise DataError(
            "the task compares probabilities of given answers, which a chat endpoint does not give "
            "(choose a task whose output_type is generate_until)"
        )

    loglikelihood_rolling = loglikelihood

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the messages as JSON: the server applies the template."""
        return json.dumps(list(chat_history))

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of prompts, which is not used."""
        return "server"


def _fingerprint(folder: str | None) -> str:
    """A hash of what decides the prompts beside the task: lm-eval's release and one's own files."""
    digest = hashlib.sha256(version("lm-eval").encode())
    files = sorted(Path(folder).rglob("*")) if folder is not None else []
    for file in files:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


class Task:
    """One task, or a group of tasks, that is open."""

    def __init__(self) -> None:
        self.name = ""
        self.limit: int | None = None
        self.manager: TaskManager | None = None
        self.asked: dict[str, dict[str, Any]] = {}

    def open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Load the data and return the items.

        The request names the task `dataset`, `limit` (items of each task) and `tasks_folder`,
        a folder with task files of one's own, or null.
        """
        self.name = request["dataset"]
        self.limit = request["limit"]
        self.manager = self._manager(request["tasks_folder"])
        if self.name not in self.manager.all_tasks:
            raise DataError("lm-eval has no such task (lm-eval ls tasks)")
        model = Carried({})
        self._evaluate(model)
        self.asked = model.asked
        items = [{"id": item, "group": ""} for item in self.asked]
        data = _fingerprint(request["tasks_folder"])
        return {"items": items, "media_root": None, "data": data}

    def _manager(self, folder: str | None) -> TaskManager:
        """Where the task is found. lm-eval's own tasks are 14,000 files, which take seconds to
        read: not for a task of one's own.
        """
        if folder is not None:
            own = TaskManager(include_path=folder, include_defaults=False)
            if self.name in own.all_tasks:
                return own
        return TaskManager(include_path=folder)

    def prompt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return an item's prompt: OpenAI messages, stop sequences, most tokens."""
        return self.asked[request["item"]]

    def score(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Score answers by item with the task's first metric."""
        answers = request["answers"]
        results = self._evaluate(Carried(answers))
        scores: dict[str, float] = {}
        for task, samples in results["samples"].items():
            names = {sample["filter"] for sample in samples}
            chosen = PREFERRED_FILTER if PREFERRED_FILTER in names else samples[0]["filter"]
            for sample in samples:
                item = f"{task}/{sample['doc_id']}"
                if sample["filter"] == chosen and item in answers:
                    metric = sample["metrics"][0]
                    scores[item] = float(sample[metric])
        overall = 100 * sum(scores.values()) / len(scores)
        return {"scores": scores, "overall": overall, "unscored": []}

    def _evaluate(self, model: Carried) -> dict[str, Any]:
        try:
            results = simple_evaluate(
                model=model,
                tasks=[self.name],
                limit=self.limit,
                task_manager=self.manager,
                apply_chat_template=True,
                fewshot_as_multiturn=True,
                log_samples=True,
                bootstrap_iters=0,
                torch_random_seed=None,  # there is no torch here
            )
        except (OSError, ConnectionError) as error:
            remedy = "it is downloaded from the Hub: HF_HOME says where from a cache"
            raise DataError(f"its data cannot be read: {error} ({remedy})") from None
        assert results is not None
        return results  # type: ignore[no-any-return]


if __name__ == "__main__":
    task = Task()
    serve_requests({"open": task.open, "prompt": task.prompt, "score": task.score})
