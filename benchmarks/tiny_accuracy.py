"""The tiny checkpoint's accuracy: BF16, FP8, NVFP4 and distilled, clips pruned by EVS, in process
and served.

    python -m benchmarks.tiny_accuracy --work out/embedded-table --json
    benchmarks/results/tiny_accuracy.json
    python -m benchmarks.tiny_accuracy … --items 100 --variants fp8,nvfp4,nvfp4_qat,nvfp4_qad
    --served bf16,fp8
    python -m benchmarks.tiny_accuracy … --split calibration --tasks text --variants
    nvfp4,nvfp4_qad@1e-3 distill.steps=80

Each form is made by its recipe in recipes/tiny/ and answers the same test items of the six tasks,
greedily; differences from BF16 are paired, with 95 % intervals. What is to be chosen, a learning
rate, is chosen on another split's items. With 100 items, two forms and one server: 25 minutes on
two CPU cores; a GPU's work is mostly waiting, so give it several --jobs. What is finished is kept
in DIR, and the same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from accuracy.answers import answer_tasks
from accuracy.endpoint import ask_endpoint
from accuracy.paired import Paired, pair, paired_table
from accuracy.scoring import result
from benchmarks.parts import Parts, write_json
from benchmarks.serving import said, vllm_version
from calibrate.samples import Sample
from checkpoint.faults import BadInput, Fault, main, nearest
from checkpoint.opened import open_checkpoint
from checkpoint.video import UNPRUNED
from export.manifest import read_manifest
from pipeline.inputs import versions
from pipeline.run import run
from recipes.loading import SHIPPED, load_recipe
from serve.process import running_server
from serve.settings import ServeSettings
from tiny.checkpoint import tiny_checkpoint
from tiny.tasks import SPLITS, TASKS, TEST_ITEMS, check_tasks, items
from tiny.training.evaluation import PRUNING_RATES

# Recipe and overrides of each form.
VARIANTS = {
    "fp8": ("fp8", []),
    "nvfp4": ("nvfp4", []),
    "nvfp4_qat": ("nvfp4_qad", ["distill.loss=cross_entropy"]),
    "nvfp4_qad": ("nvfp4_qad", []),
}
Samples = Mapping[str, Sequence[Sample]]
Answers = dict[str, list[str | None]]


def check_variants(names: Sequence[str]) -> None:
    """Refuse what is no form, or no rate.

    Raises:
        BadInput: Naming the nearest form of each.
    """
    faults = []
    for name in names:
        form, at, rate = name.partition("@")
        if form not in VARIANTS:
            faults.append(Fault("--variants", f"unknown form {form!r}", nearest(form, VARIANTS)))
        elif at and (VARIANTS[form][0] != "nvfp4_qad" or not _is_rate(rate)):
            faults.append(
                Fault("--variants", f"{name!r} has no learning rate", "write as in nvfp4_qad@3e-4")
            )
    if faults:
        raise BadInput(*faults)


def _digest(directory: Path) -> str:
    with (directory / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_rate(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False


def made(variant: str, work: Path, model: Path, settings: Sequence[str] = ()) -> Path:
    """The directory of a form, made by its recipe when it is not there; the gate may be missed.

    Args:
        variant: Of `VARIANTS`; distilled at another learning rate as in `nvfp4_qad@3e-4`.
        work: Folder of the directories.
        model: The BF16 checkpoint.
        settings: More overrides of the recipe that distils.
    """
    output = work / variant
    if not output.exists():
        name, _, rate = variant.partition("@")
        recipe, overrides = VARIANTS[name]
        # A rate that is too high is to be seen to its end.
        rates = [f"distill.learning_rate={rate}", "distill.patience=1000"] if rate else []
        given = [f"model={model}", f"output={output}", "accuracy.tasks=null", *overrides, *rates]
        given += settings if recipe == "nvfp4_qad" else ()
        run(load_recipe(SHIPPED / "tiny" / f"{recipe}.yaml", given))
    return output


def answered(
    form: str, rate: float, asked: Samples, work: Path, model: Path, settings: Sequence[str]
) -> Answers:
    """What a form, made when it is not there, answers in process with clips pruned at `rate`."""
    directory = model if form == "bf16" else made(form, work, model, settings)
    return answer_tasks(open_checkpoint(directory), asked, UNPRUNED.with_rate(rate))


def served_answers(
    name: str, asked: Samples, work: Path, model: Path, flags: Sequence[str], share: float | None
) -> dict[str, Any]:
    """What vLLM, with a share of the GPU's memory, answers of a form that is there, and with which
    kernels.

    `name` may end in `:BACKEND`, vLLM's linear backend.
    """
    form, _, backend = name.partition(":")
    directory = model if form == "bf16" else work / form
    settings = ServeSettings(port=0, video=UNPRUNED, gpu_memory_utilization=share)
    with running_server(
        directory, settings, [*(["--linear-backend", backend] if backend else []), *flags]
    ) as server:
        answers = ask_endpoint(server.url, asked)
        return {
            "answers": answers,
            **said(server.log.read_text(encoding="utf-8", errors="replace")),
        }


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
    """Answer everything, then print the tables. Accuracies are shares, 0 to 1.

    Args:
        work: Folder of the directories and of what is finished.
        variants: Forms beside BF16.
        served: Which of BF16 and `variants` vLLM serves as well; with its linear backend as in
            `nvfp4:emulation`.
        count: Items of a task.
        tasks: Of `accuracy.tasks.TASKS`.
        settings: Overrides of the recipe that distils.
        split: Whose items are asked; those of `calibration` are of a seed that no recipe draws.
        jobs: Processes that make forms and answer at once.
        flags: More flags of `vllm serve`.
    """
    console = Console()
    bf16 = tiny_checkpoint(work / "bf16").directory
    plan = {
        "items": count,
        "tasks": tasks,
        "settings": settings,
        "weights": _digest(bf16),
        "split": split,
    }
    parts = Parts(work / "measured.json", plan)
    # Recipes draw the calibration split's series 0, 1000003 and 2000003.
    samples: Samples = {
        task: items(task, split, count, seed=0 if split == "test" else 1) for task in tasks
    }
    clips = {task: asked for task, asked in samples.items() if task.startswith("video")}
    work_on = functools.partial(answered, work=work, model=bf16, settings=settings)
    in_process = {
        (form, 0.0): functools.partial(work_on, form, 0.0, samples) for form in ("bf16", *variants)
    }
    rates = PRUNING_RATES if clips else ()
    in_process |= {
        ("bf16", rate): functools.partial(work_on, "bf16", rate, clips) for rate in rates if rate
    }
    answers = parts.all(
        {f"{form}, EVS {rate}": job for (form, rate), job in in_process.items()}, jobs
    )
    share = None if jobs == 1 else 0.9 / jobs
    serve = functools.partial(
        served_answers, asked=samples, work=work, model=bf16, flags=flags, share=share
    )
    part_of = {name: shlex.join([name, "served", *flags]) for name in served}
    by_server = parts.all({part_of[name]: functools.partial(serve, name) for name in served}, jobs)

    def answers_of(form: str, rate: float = 0.0) -> Answers:
        return answers[f"{form}, EVS {rate}"]

    paired: dict[str, list[Paired]] = {}
    for variant in variants:
        paired[variant] = pair(samples, answers_of("bf16"), answers_of(variant))
        console.print(paired_table(paired[variant], "BF16", variant))
    curve: dict[str, dict[str, float]] = {}
    for rate in rates:
        pruned = answers_of("bf16", rate)
        curve[str(rate)] = {
            task: result(task, asked, pruned[task]).accuracy for task, asked in clips.items()
        }
    table = Table(title="BF16, clips pruned by EVS", title_justify="left")
    for column in ("rate", *clips):
        table.add_column(column, justify="right")
    for name, row in curve.items():
        table.add_row(name, *(f"{row[task]:.1%}" for task in clips))
    if clips:
        console.print(table)
    endpoint: dict[str, list[Paired]] = {}
    from_bf16: dict[str, list[Paired]] = {}
    reference = by_server[part_of["bf16"]]["answers"] if "bf16" in served else answers_of("bf16")
    for name in served:
        endpoint[name] = pair(
            samples, answers_of(name.partition(":")[0]), by_server[part_of[name]]["answers"]
        )
        console.print(paired_table(endpoint[name], f"{name} in process", f"{name} served by vLLM"))
        if name != "bf16":
            from_bf16[name] = pair(samples, reference, by_server[part_of[name]]["answers"])
    parts.done()
    distilled = [name for name in variants if name.startswith("nvfp4_qa")]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "items": count,
        "split": split,
        "versions": versions(),
        "against_bf16": {name: _plain(rows) for name, rows in paired.items()},
        "evs_bf16": curve,
        "served_against_in_process": {name: _plain(rows) for name, rows in endpoint.items()},
        "served_against_bf16": {name: _plain(rows) for name, rows in from_bf16.items()},
        "vllm": vllm_version() if served else None,
        "kernels": {name: by_server[part_of[name]]["kernels"] for name in served},
        "distillation": {name: _distillation(work / name) for name in distilled},
        "won_back": _all_won_back(paired),
        "won_back_served": _all_won_back(from_bf16),
    }


def won_back(ptq: Sequence[Paired], distilled: Sequence[Paired]) -> float | None:
    """Share of what PTQ lost on the mean of the tasks that distillation wins back; None where
    nothing was lost.
    """
    lost = ptq[-1].reference - ptq[-1].variant
    return round((distilled[-1].variant - ptq[-1].variant) / lost, 3) if lost > 0 else None


def _all_won_back(paired: Mapping[str, Sequence[Paired]]) -> dict[str, float | None]:
    """`won_back` of every distilled form whose PTQ, with the same linear backend, is there."""
    ptq = {
        name: "nvfp4" + "".join(name.partition(":")[1:])
        for name in paired
        if name.startswith("nvfp4_qa")
    }
    return {name: won_back(paired[ptq[name]], paired[name]) for name in ptq if ptq[name] in paired}


def _distillation(directory: Path) -> dict[str, Any]:
    """What the manifest says of how a form was distilled; `held_out` is the loss by step, in nats."""
    manifest = read_manifest(directory)
    assert manifest is not None
    assert manifest.distillation is not None
    return {key: value for key, value in manifest.distillation.items() if key != "losses"}


def _plain(rows: Sequence[Paired]) -> list[dict[str, Any]]:
    return [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in dataclasses.asdict(row).items()}
        for row in rows
    ]


def _run() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tiny_accuracy", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for exports; those there are kept"
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, separated by commas")
    parser.add_argument("--items", type=int, default=TEST_ITEMS, help="items a task")
    parser.add_argument("--variants", default="fp8,nvfp4", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument(
        "--served",
        default="bf16",
        help="which of bf16 and the variants vLLM serves too; nvfp4:emulation names its linear backend",
    )
    parser.add_argument(
        "--split",
        default="test",
        choices=SPLITS[1:],
        help="whose items; choose settings on another",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes that make forms and answer at once"
    )
    parser.add_argument(
        "--vllm", default="", metavar="FLAGS", help="more flags of vllm serve, in one word"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="fields of the recipe that distils"
    )
    given = parser.parse_args()
    texts = (given.variants, given.served, given.tasks)
    variants, served, tasks = ([name for name in text.split(",") if name] for text in texts)
    check_variants(variants)
    check_tasks(tasks)
    if strange := [name for name in served if name.partition(":")[0] not in ("bf16", *variants)]:
        forms = ["bf16", *variants]
        raise BadInput(
            *(
                Fault("--served", f"{name!r} is not measured", nearest(name, forms))
                for name in strange
            )
        )
    if given.jobs < 1:
        raise BadInput(Fault("--jobs", f"is {given.jobs}", "give 1 or more"))
    given.work.mkdir(parents=True, exist_ok=True)
    measured = measure(
        given.work,
        variants,
        served,
        given.items,
        tasks,
        given.settings,
        given.split,
        given.jobs,
        shlex.split(given.vllm),
    )
    asked = {
        "split": given.split,
        "tasks": given.tasks,
        "items": given.items,
        "variants": given.variants,
    }
    asked |= {"served": given.served} | ({"vllm": given.vllm} if given.vllm else {})
    options = [f"--{name}={value}" for name, value in asked.items()]
    command = shlex.join(["python", "-m", "benchmarks.tiny_accuracy", *options, *given.settings])
    write_json(given.json, {"command": command, **measured})
    return 0


if __name__ == "__main__":
    main(_run)
