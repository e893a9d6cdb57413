"""Runs a suite: opens the tasks, asks each checkpoint what it was not asked, scores, compares."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accuracy.suites.asking import Asking, Endpoint, Profile, ask_items, scored_text, unanswered
from accuracy.suites.catalogue import NEEDLE, Task
from accuracy.suites.harness import DataSource, HarnessTask, Item, Judge, OpenTask
from accuracy.suites.load import FIRST, MOST, Load
from accuracy.suites.needle import NeedleTask
from accuracy.suites.outcome import Asked, Compared, CurvePoint, Noise
from accuracy.suites.progress import AskingProgress, show_duration
from accuracy.suites.published import published_curve, published_rates, published_row
from accuracy.suites.serving import Model, check_models, common_root, with_one_restart
from accuracy.suites.store import AnswerStore, Key, settings_hash
from accuracy.suites.verdict import TaskScores, compare_tasks
from checkpoint.config import read_config
from checkpoint.content import content_hash
from checkpoint.faults import BadInput, Fault
from checkpoint.log import get_logger
from checkpoint.video import Video
from serve.environment import find_environment

logger = get_logger(__name__)

_CLIPS_AT_ONCE = 16
"""Requests with clips at a time, at most: the server prepares one after the other, and each holds
its frames, 354 MB for 128 of them."""


@dataclass(frozen=True)
class SuitePlan:
    """What is measured, and how.

    Attributes:
        tasks: The tasks.
        source: Where their data is.
        video: How clips are seen, on all sides.
        profile: How models are asked.
        out: Folder for answers and logs.
        max_loss: Points that a task may lose.
        judge: Who reads answers that need it; None for a rule.
        repeats: How often BF16's server is asked: twice to measure its noise.
        concurrency: Requests at a time; None for as many as keep the server busy.
        rates: EVS rates of the curve; None for those of the published figure.
    """

    tasks: tuple[Task, ...]
    source: DataSource
    video: Video
    profile: Profile
    out: Path
    max_loss: float
    judge: Judge | None = None
    repeats: int = 1
    concurrency: int | None = None
    rates: tuple[float, ...] | None = None


class SuiteRun:
    """A suite whose tasks are open.

    Attributes:
        plan: What is measured.
        tasks: The open tasks by name.
        asked: How fast servers answered what this run has asked.
    """

    def __init__(self, plan: SuitePlan, tasks: Mapping[str, OpenTask]) -> None:
        self.plan = plan
        self.tasks = tasks
        self.asked: list[Asked] = []
        self._hashes: dict[Path, str] = {}
        self._at_once: dict[tuple[Model, bool], int] = {}

    def compare(self, reference: Model, variants: Sequence[Model]) -> list[Compared]:
        """Ask BF16 and the variants, and compare them.

        Raises:
            BadInput: A directory cannot be served, or data is missing.
            ServerDied: A server died twice.
        """
        check_models([reference, *variants])
        ours = self.scores(reference, self.plan.video, repeats=self.plan.repeats)
        items = {name: task.items for name, task in self.tasks.items()}
        published = {}
        if not self.plan.source.is_own:
            published = {name: published_row(name) for name in self.tasks}
        compared = []
        for variant in variants:
            theirs = self.scores(variant, self.plan.video)
            rows = compare_tasks(
                ours, theirs, items, self.plan.max_loss, published, self.not_comparable()
            )
            compared.append(Compared(variant, self.hash_of(variant), tuple(rows)))
        return compared

    def not_comparable(self) -> tuple[str, ...]:
        """Return the tasks that are scored otherwise than the published figures."""
        if self.plan.judge is not None:
            return ()
        return tuple(task.name for task in self.plan.tasks if task.needs_judge)

    def noise(self, model: Model) -> list[Noise]:
        """Count what differs between a server's first and second answers: see `repeats`."""
        with self._store(model) as store:
            found = []
            for task in self.plan.tasks:
                found.append(self._noise_of(task, model, store))
        return found

    def curve(self, models: Sequence[Model]) -> list[CurvePoint]:
        """Ask the video tasks at the plan's EVS rates."""
        rates = published_rates() if self.plan.rates is None else self.plan.rates
        points = []
        for model in models:
            for rate in rates:
                scores = self.scores(model, self.plan.video.with_rate(rate), only_video=True)
                for name, task in scores.items():
                    accuracy = 100 * sum(task.scores.values()) / max(1, len(task.scores))
                    published = {}
                    if not self.plan.source.is_own:
                        for precision, curve in published_curve(name).items():
                            if rate in curve:
                                published[precision] = curve[rate]
                    points.append(
                        CurvePoint(
                            name, model.directory, rate, accuracy, len(task.scores), published
                        )
                    )
        return points

    def scores(
        self, model: Model, video: Video, only_video: bool = False, repeats: int = 1
    ) -> dict[str, TaskScores]:
        """Ask a model what it has not answered yet, and score its answers by task."""
        with self._store(model) as store:
            self._ask(model, video, store, only_video, repeats)
            found = {}
            for task in self._chosen(only_video):
                found[task.name] = self._scores_of(task, model, video, store)
        return found

    def hash_of(self, model: Model) -> str:
        """Return the hash of a model's directory, computed once."""
        if model.directory not in self._hashes:
            logger.info("%s: reading its content", model.directory)
            self._hashes[model.directory] = content_hash(model.directory)
        return self._hashes[model.directory]

    def _chosen(self, only_video: bool) -> list[Task]:
        return [task for task in self.plan.tasks if task.is_video or not only_video]

    def _store(self, model: Model) -> AnswerStore:
        name = f"{model.directory.resolve().name}-{self.hash_of(model)}.jsonl"
        return AnswerStore(self.plan.out / "answers" / name)

    def _key(self, task: Task, model: Model, video: Video, repeat: int) -> Callable[[Item], Key]:
        server = model.url or str(find_environment().vllm)
        settings = settings_hash(
            data=self.tasks[task.name].data,
            system=self.plan.profile.system,
            max_tokens=self.plan.profile.max_tokens,
            server=server,
            video=str(video) if task.is_video else None,
        )
        return lambda item: Key(task.name, item.id, settings, repeat)

    def _ask(
        self,
        model: Model,
        video: Video,
        store: AnswerStore,
        only_video: bool,
        repeats: int,
    ) -> None:
        """Ask what has no answer; no server is started when there is nothing."""
        chosen = self._chosen(only_video)

        def left(task: Task, repeat: int) -> list[Item]:
            key = self._key(task, model, video, repeat)
            return unanswered(self.tasks[task.name].items, key, store)

        rounds = [(task, repeat) for repeat in range(repeats) for task in chosen]
        total = sum(len(left(task, repeat)) for task, repeat in rounds)
        if not total:
            return
        roots = [root for root in (task.media_root for task in self.tasks.values()) if root]
        log = self.plan.out / "logs" / f"{model.directory.resolve().name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        logger.info("%s: %d items to ask", model.directory, total)
        with AskingProgress(model.directory.resolve().name, total) as progress:

            def ask(endpoint: Endpoint) -> None:
                for task, repeat in rounds:
                    items = left(task, repeat)
                    if items:
                        key = self._key(task, model, video, repeat)
                        self._ask_task(task, model, video, items, key, endpoint, store, progress)

            with_one_restart(model, video, common_root(roots), log, ask)

    def _ask_task(
        self,
        task: Task,
        model: Model,
        video: Video,
        items: Sequence[Item],
        key: Callable[[Item], Key],
        endpoint: Endpoint,
        store: AnswerStore,
        progress: AskingProgress,
    ) -> None:
        """Ask items of one task, and keep how fast they were answered."""
        load = self._load(task, model, endpoint)
        progress.begin(task.name, load.at_once)
        started = time.monotonic()
        try:
            ask_items(
                Asking(endpoint, self.plan.profile, load),
                items,
                self.tasks[task.name].prompt,
                key,
                store,
                on_reply=lambda: progress.answered(load.at_once),
            )
        finally:
            load.finish()
            self._at_once[model, task.is_video] = load.at_once
            replies = [store.get(key(item)) for item in items]
            known = [reply for reply in replies if reply is not None]
            asked = Asked(
                task=task.name,
                directory=model.directory,
                rate=video.pruning_rate if task.is_video else None,
                items=len(known),
                failed=sum(reply.answer is None for reply in known),
                seconds=time.monotonic() - started,
                prompt_tokens=sum(reply.prompt_tokens for reply in known),
                completion_tokens=sum(reply.completion_tokens for reply in known),
                at_once=load.at_once,
                steps=tuple(load.steps),
            )
            self.asked.append(asked)
            logger.info(
                "%s: %s: %d answers in %s, %d requests at a time",
                *(model.directory, task.name, asked.items, show_duration(asked.seconds)),
                load.at_once,
            )

    def _load(self, task: Task, model: Model, endpoint: Endpoint) -> Load:
        """How many requests at a time; it begins with what the server's last task has found."""
        most = _CLIPS_AT_ONCE if task.is_video else MOST
        given = self.plan.concurrency
        if given is not None:
            return Load(given, min(given, most), is_fixed=True, queue=endpoint.queue)
        first = self._at_once.get((model, task.is_video), FIRST)
        return Load(first, most, is_fixed=False, queue=endpoint.queue)

    def _scores_of(
        self, task: Task, model: Model, video: Video, store: AnswerStore, repeat: int = 0
    ) -> TaskScores:
        open_task = self.tasks[task.name]
        key = self._key(task, model, video, repeat)
        answers = {}
        failed = truncated = empty = 0
        reasons: dict[str, None] = {}
        for item in open_task.items:
            reply = store.get(key(item))
            if reply is None or reply.answer is None:
                failed += 1
                reasons[reply.error if reply and reply.error else "not asked"] = None
                continue
            answers[item.id] = scored_text(reply, self.plan.profile)
            truncated += reply.finish_reason == "length"
            empty += not answers[item.id].strip()
        if not answers:
            return TaskScores({}, len(open_task.items), failed, reasons=tuple(reasons))
        scored = open_task.score(answers, self.plan.judge if task.needs_judge else None)
        _check_overall(task, open_task, scored.scores, scored.overall)
        return TaskScores(
            scores=scored.scores,
            asked=len(open_task.items),
            failed=failed,
            truncated=truncated,
            empty=empty,
            unscored=len(scored.unscored),
            reasons=tuple(reasons),
        )

    def _noise_of(self, task: Task, model: Model, store: AnswerStore) -> Noise:
        keys = [self._key(task, model, self.plan.video, repeat) for repeat in range(2)]
        different = items = 0
        for item in self.tasks[task.name].items:
            first, second = (store.get(key(item)) for key in keys)
            if first is None or second is None or None in (first.answer, second.answer):
                continue
            items += 1
            different += first.answer != second.answer
        scores = []
        for repeat in range(2):
            scored = self._scores_of(task, model, self.plan.video, store, repeat)
            scores.append(scored.scores)
        common = scores[0].keys() & scores[1].keys()
        scored_differently = sum(scores[0][item] != scores[1][item] for item in common)
        return Noise(task.name, items, different, scored_differently)


def _check_overall(
    task: Task, open_task: OpenTask, scores: Mapping[str, float], overall: float
) -> None:
    """Hold our figure against the harness's own, so that no change of a harness goes unnoticed."""
    groups: dict[str, list[float]] = {}
    for item in open_task.items:
        if item.id in scores:
            groups.setdefault(item.group, []).append(scores[item.id])
    means = [sum(values) / len(values) for values in groups.values()]
    ours = 100 * sum(means) / len(means)
    if abs(ours - overall) > 0.06:  # Video-MME's figure is rounded to 0.1
        raise AssertionError(f"{task.name}: {ours:.2f} by item, {overall:.2f} by the harness")


@contextlib.contextmanager
def open_suite(plan: SuitePlan, reference: Path) -> Iterator[SuiteRun]:
    """Open the tasks of a suite for the length of a `with` block.

    Args:
        plan: What is measured.
        reference: BF16's directory: its tokenizer and context measure the needle's texts.

    Raises:
        BadInput: With every task whose data is missing.
    """
    (plan.out / "logs").mkdir(parents=True, exist_ok=True)
    faults: list[Fault] = []
    with contextlib.ExitStack() as opened:
        tasks: dict[str, OpenTask] = {}
        for task in plan.tasks:
            try:
                tasks[task.name] = _open_task(task, plan, reference)
            except BadInput as bad:
                faults += bad.faults
                continue
            opened.callback(tasks[task.name].close)
        if faults:
            raise BadInput(*faults)
        yield SuiteRun(plan, tasks)


def _open_task(task: Task, plan: SuitePlan, reference: Path) -> OpenTask:
    if task is NEEDLE:
        config = read_config(reference)
        tokenizer = reference / "tokenizer.json"
        return NeedleTask(tokenizer, config.max_length, plan.source.limit)
    return HarnessTask(task, plan.source, plan.out / "logs" / f"harness-{task.name}.log")
