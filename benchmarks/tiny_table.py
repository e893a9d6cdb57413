"""Makes the forms of the tiny checkpoint, lets them answer the tasks, and compares the answers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from accuracy.answers import answer_tasks
from accuracy.endpoint import ask_endpoint
from accuracy.paired import Paired, pair, paired_table
from accuracy.scoring import result
from benchmarks.environment import device_name
from benchmarks.parts import Parts
from benchmarks.serving import backend_flags, read_log, split_backend, vllm_version
from benchmarks.tiny_forms import VARIANTS, split_rate
from calibrate.samples import Sample
from checkpoint.libraries import installed_versions, prepare_libraries
from checkpoint.opened import open_checkpoint
from checkpoint.video import UNPRUNED
from export.manifest import read_manifest
from pipeline.run import run
from recipes.loading import SHIPPED, load_recipe
from serve.process import running_server
from serve.settings import ServeSettings
from tiny.checkpoint import tiny_checkpoint
from tiny.tasks import TASKS, items
from tiny.training.evaluation import PRUNING_RATES

Samples = Mapping[str, Sequence[Sample]]
Answers = dict[str, list[str | None]]


def made(variant: str, work: Path, model: Path, settings: Sequence[str] = ()) -> Path:
    """Return the directory of a form; run its recipe if the directory does not exist.

    The gate of the recipe may be missed.

    Args:
        variant: A key of `VARIANTS`, with another learning rate as in `nvfp4_qad@3e-4`.
        work: Folder of the directories.
        model: The BF16 checkpoint.
        settings: More overrides for recipes that distil.
    """
    output = work / variant
    if output.exists():
        return output
    name, rate = split_rate(variant)
    form = VARIANTS[name]
    overrides = [f"model={model}", f"output={output}", "accuracy.tasks=null", *form.overrides]
    if rate:
        # With such patience the run goes to its end, also at a rate that is too high.
        overrides += [f"distill.learning_rate={rate}", "distill.patience=1000"]
    if form.is_distilled:
        overrides += settings
    run(load_recipe(SHIPPED / "tiny" / f"{form.recipe}.yaml", overrides))
    return output


@dataclass(frozen=True)
class Questions:
    """What every form is asked.

    Attributes:
        samples: Items by task.
        work: Folder of the forms.
        model: The BF16 checkpoint.
    """

    samples: Samples
    work: Path
    model: Path

    @property
    def clips(self) -> Samples:
        """The items of the tasks about clips."""
        return {task: asked for task, asked in self.samples.items() if task.startswith("video")}


def answered(form: str, rate: float, questions: Questions, settings: Sequence[str]) -> Answers:
    """Answer in this process.

    Args:
        form: `bf16` or a variant, which is made if it does not exist.
        rate: Pruning rate of clips. At a rate above 0 only the tasks about clips are answered.
        questions: The items.
        settings: More overrides for recipes that distil.
    """
    directory = questions.model
    if form != "bf16":
        directory = made(form, questions.work, questions.model, settings)
    samples = questions.clips if rate > 0 else questions.samples
    return answer_tasks(open_checkpoint(directory), samples, UNPRUNED.with_rate(rate))


def served_answers(
    name: str, questions: Questions, flags: Sequence[str], share: float | None
) -> dict[str, Any]:
    """Answer with vLLM.

    Args:
        name: `bf16` or a variant, which exists; `:BACKEND` chooses vLLM's linear backend.
        questions: The items; clips are not pruned.
        flags: More flags of `vllm serve`.
        share: Share of the GPU's memory for vLLM; None for its default.

    Returns:
        `answers` by task, and what `benchmarks.serving.read_log` returns.
    """
    form, backend = split_backend(name)
    directory = questions.model if form == "bf16" else questions.work / form
    settings = ServeSettings(port=0, video=UNPRUNED, gpu_memory_utilization=share)
    all_flags = [*backend_flags(backend), *flags]
    with running_server(directory, settings, all_flags) as server:
        answers = ask_endpoint(server.url, questions.samples)
        log = server.log.read_text(encoding="utf-8", errors="replace")
    return {"answers": answers, **read_log(log)}


def measure(
    work: Path,
    variants: Sequence[str],
    served: Sequence[str],
    count: int,
    tasks: Sequence[str] = tuple(TASKS),
    settings: Sequence[str] = (),
    split: str = "test",
    jobs: int = 1,
    flags: Sequence[str] = (),
) -> dict[str, Any]:
    """Let every form answer every item, and print the tables.

    Args:
        work: Folder of the directories and of what is finished.
        variants: Forms beside BF16.
        served: Those of BF16 and `variants` that vLLM serves too, with its linear backend as in
            `nvfp4:emulation`.
        count: Items per task.
        tasks: Keys of `tiny.tasks.TASKS`.
        settings: Overrides for recipes that distil.
        split: Whose items are used. Those of `calibration` are of a series that no recipe draws.
        jobs: Processes that make forms and answer at the same time.
        flags: More flags of `vllm serve`.

    Returns:
        The result file's fields; accuracies are shares from 0 to 1.
    """
    model = tiny_checkpoint(work / "bf16").directory
    kept_for = {
        "items": count,
        "tasks": tasks,
        "settings": settings,
        "weights": _digest(model / "model.safetensors"),
        "split": split,
    }
    parts = Parts(work / "measured.json", kept_for)
    # Recipes draw series 0, 1000003 and 2000003 of the calibration split.
    seed = 0 if split == "test" else 1
    samples = {task: items(task, split, count, seed) for task in tasks}
    questions = Questions(samples, work, model)
    rates = PRUNING_RATES if questions.clips else ()
    answers = _in_process(variants, rates, questions, settings, parts, jobs)
    by_server = _by_servers(served, questions, flags, parts, jobs)
    table = Comparison(questions, answers, by_server)
    against_bf16 = {variant: table.with_bf16(variant) for variant in variants}
    curve = {str(rate): table.pruned(rate) for rate in rates}
    if curve:
        _print_curve(curve)
    in_process = {name: table.served_with_in_process(name) for name in served}
    served_forms = [name for name in served if name != "bf16"]
    served_against_bf16 = {name: table.served_with_bf16(name) for name in served_forms}
    parts.done()
    distilled = [name for name in variants if name.startswith("nvfp4_qa")]
    return {
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "items": count,
        "split": split,
        "versions": installed_versions(),
        "against_bf16": _plain(against_bf16),
        "evs_bf16": curve,
        "served_against_in_process": _plain(in_process),
        "served_against_bf16": _plain(served_against_bf16),
        "vllm": vllm_version() if served else None,
        "kernels": {name: by_server[name]["kernels"] for name in served},
        "distillation": {name: distillation(work / name) for name in distilled},
        "won_back": _all_won_back(against_bf16),
        "won_back_served": _all_won_back(served_against_bf16),
    }


def _in_process(
    variants: Sequence[str],
    rates: Sequence[float],
    questions: Questions,
    settings: Sequence[str],
    parts: Parts,
    jobs: int,
) -> dict[tuple[str, float], Answers]:
    """Return the answers of every form without pruning, and those of BF16 at every rate."""
    asked = [(form, 0.0) for form in ("bf16", *variants)]
    asked += [("bf16", rate) for rate in rates if rate > 0]
    todo = {}
    for form, rate in asked:
        name = f"{form}, EVS {rate}"
        todo[name] = functools.partial(answered, form, rate, questions, settings)
    found = parts.all(todo, jobs, prepare_libraries)
    return {(form, rate): found[f"{form}, EVS {rate}"] for form, rate in asked}


def _by_servers(
    served: Sequence[str], questions: Questions, flags: Sequence[str], parts: Parts, jobs: int
) -> dict[str, dict[str, Any]]:
    """Return what `served_answers` returns for every form that is served."""
    share = None if jobs == 1 else 0.9 / jobs
    part_names = {name: shlex.join([name, "served", *flags]) for name in served}
    todo = {}
    for name, part in part_names.items():
        todo[part] = functools.partial(served_answers, name, questions, flags, share)
    found = parts.all(todo, jobs)
    return {name: found[part] for name, part in part_names.items()}


@dataclass(frozen=True)
class Comparison:
    """Compares answers to the same items; prints each comparison as a table.

    Attributes:
        questions: The items.
        answers: Of each form in this process, at a pruning rate.
        by_server: What `served_answers` returns for each form that is served.
    """

    questions: Questions
    answers: Mapping[tuple[str, float], Answers]
    by_server: Mapping[str, Mapping[str, Any]]

    def with_bf16(self, variant: str) -> list[Paired]:
        """Compare a variant with BF16, both in this process."""
        reference = self.answers["bf16", 0.0]
        rows = pair(self.questions.samples, reference, self.answers[variant, 0.0])
        Console().print(paired_table(rows, "BF16", variant))
        return rows

    def served_with_in_process(self, name: str) -> list[Paired]:
        """Compare a form that vLLM serves with the same form in this process."""
        form, _ = split_backend(name)
        reference = self.answers[form, 0.0]
        rows = pair(self.questions.samples, reference, self.by_server[name]["answers"])
        Console().print(paired_table(rows, f"{name} in process", f"{name} served by vLLM"))
        return rows

    def served_with_bf16(self, name: str) -> list[Paired]:
        """Compare a form that vLLM serves with BF16, which is served too if it was measured."""
        reference = self.answers["bf16", 0.0]
        if "bf16" in self.by_server:
            reference = self.by_server["bf16"]["answers"]
        return pair(self.questions.samples, reference, self.by_server[name]["answers"])

    def pruned(self, rate: float) -> dict[str, float]:
        """Return the accuracy of BF16 on clips at a pruning rate, by task."""
        answers = self.answers["bf16", rate]
        accuracy = {}
        for task, asked in self.questions.clips.items():
            accuracy[task] = result(task, asked, answers[task]).accuracy
        return accuracy


def _print_curve(curve: Mapping[str, Mapping[str, float]]) -> None:
    """Print the accuracy by pruning rate and task."""
    tasks = list(next(iter(curve.values())))
    table = Table(title="BF16, clips pruned by EVS", title_justify="left")
    for column in ("rate", *tasks):
        table.add_column(column, justify="right")
    for rate, row in curve.items():
        shown = [f"{row[task]:.1%}" for task in tasks]
        table.add_row(rate, *shown)
    Console().print(table)


def won_back(ptq: Sequence[Paired], distilled: Sequence[Paired]) -> float | None:
    """Return the share of PTQ's loss, on the mean of the tasks, that distillation wins back.

    Args:
        ptq: PTQ against BF16; the last row is the mean.
        distilled: The distilled form against BF16.

    Returns:
        1 if all is won back, below 0 if distillation made it worse, None if nothing was lost.
    """
    mean = ptq[-1]
    lost = mean.reference - mean.variant
    if lost <= 0:
        return None
    return round((distilled[-1].variant - mean.variant) / lost, 3)


def _all_won_back(paired: Mapping[str, Sequence[Paired]]) -> dict[str, float | None]:
    """Return `won_back` of every distilled form whose PTQ, with the same backend, was measured."""
    shares = {}
    for name, rows in paired.items():
        _, backend = split_backend(name)
        ptq = f"nvfp4:{backend}" if backend else "nvfp4"
        if name.startswith("nvfp4_qa") and ptq in paired:
            shares[name] = won_back(paired[ptq], rows)
    return shares


def distillation(directory: Path) -> dict[str, Any]:
    """Return what the manifest records about a distillation, without the loss of every step.

    `held_out` is the held-out loss by step, in nats per token.
    """
    manifest = read_manifest(directory)
    assert manifest is not None
    return {key: value for key, value in manifest.distillation.items() if key != "losses"}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(tables: Mapping[str, Sequence[Paired]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of tables as plain data, with four decimals."""
    return {name: [_plain_row(row) for row in rows] for name, rows in tables.items()}


def _plain_row(row: Paired) -> dict[str, Any]:
    values = dataclasses.asdict(row)
    for name, value in values.items():
        if isinstance(value, float):
            values[name] = round(value, 4)
    return values
