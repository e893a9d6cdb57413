"""What a model card says: metadata, text, and .eval_results/ from the same numbers."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from checkpoint.atomic import write_text
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.log import get_logger
from checkpoint.reading import read_small_file
from export.publish.facts import Facts
from export.publish.recorded import Task, mean_task, overall_agreement
from export.publish.serving import kernels, serve_commands
from export.publish.templates import render_markdown

logger = get_logger(__name__)

README = "README.md"
EVAL_RESULTS = ".eval_results/hybridquant.yaml"
MARK = "<!-- written by hybridquant card -->"
"""Tells our card from the source's, which an export starts with."""

PIPELINE = "image-text-to-text"
LIBRARY = "vllm"
OWN_TASKS = "hybridquant/tiny-tasks"
"""Stands for the dataset of tasks that have none on the Hub: those of the tiny checkpoint."""

_RELEASED = {
    "NVIDIA-Nemotron-Nano-12B-v2-VL-BF16": "nvidia/NVIDIA-Nemotron-Nano-12B-v2-VL-BF16",
}
"""Names on the Hub by the folder's name that people download them to."""

_CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Origin:
    """What the Hub wants to know about where a model comes from.

    Attributes:
        base_model: Name on the Hub of the model that was quantized.
        license: The Hub's identifier, or `other`.
        license_name: Its name, for `other`.
        license_link: Where it can be read, for `other`.
    """

    base_model: str
    license: str
    license_name: str | None = None
    license_link: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What the verifier found.

    Attributes:
        faults: Every fault.
        compared: Whether the weights were compared with the source.
    """

    faults: tuple[Fault, ...]
    compared: bool


def find_origin(facts: Facts, given: argparse.Namespace) -> Origin:
    """Return base model and licence: as given, as README.md's metadata has them, or as they follow
    from the recipe and a LICENSE file.

    Raises:
        BadInput: With each that is not known.
    """
    known = _readme_metadata(facts.directory)
    base_model = given.base_model or known.get("base_model") or _base_model(facts.model)
    license = given.license or known.get("license")
    license_name = given.license_name or known.get("license_name")
    license_link = given.license_link or known.get("license_link")
    if license is None and (facts.directory / "LICENSE").exists():
        license = "other"
        license_name = license_name or "license-of-the-base-model"
        license_link = license_link or "LICENSE"
    faults = []
    if not isinstance(base_model, str) or not _HUB_NAME.fullmatch(base_model):
        what = f"the base model's name on the Hub is not known, the recipe says {facts.model!r}"
        faults.append(Fault(str(facts.directory), what, "give --base-model ORG/NAME"))
    if not isinstance(license, str):
        what = "neither README.md's metadata nor a LICENSE file says the licence"
        faults.append(Fault(str(facts.directory), what, "give --license, such as apache-2.0"))
    if faults:
        raise BadInput(*faults)
    return Origin(str(base_model), str(license), license_name, license_link)


def card_text(facts: Facts, origin: Origin, verdict: Verdict, name: str, notice: str = "") -> str:
    """Return README.md: metadata and text. The same facts give the same text.

    Args:
        facts: The export's.
        origin: Base model and licence.
        verdict: What the verifier found.
        name: What the commands call the model: a directory, or `ORG/NAME` on the Hub.
        notice: A sentence that is shown first, such as that the gate failed.
    """
    metadata = card_metadata(facts, origin, name)
    text = render_markdown(
        "card.md.jinja",
        facts=facts,
        origin=origin,
        verdict=verdict,
        name=name,
        notice=notice,
        mark=MARK,
        overall=overall_agreement(facts.agreement),
        commands=serve_commands(facts, name),
        kernels=kernels(facts),
    )
    return f"---\n{metadata.to_yaml()}\n---\n{text}"


def card_metadata(facts: Facts, origin: Origin, name: str) -> ModelCardData:
    """Return the metadata block, made by the Hub's own classes."""
    formats = [label.lower() for label in facts.formats if label != "BF16"]
    tags = ["hybridquant", "modelopt", "quantized", *formats, "vllm", "video", "evs"]
    return ModelCardData(
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        base_model=origin.base_model,
        base_model_relation="quantized",
        library_name=LIBRARY,
        pipeline_tag=PIPELINE,
        tags=list(dict.fromkeys(tags)),
        model_name=name.rpartition("/")[2] if facts.all_tasks else None,
        eval_results=[_eval_result(task) for task in _benchmarks(facts)] or None,
    )


def eval_results_text(facts: Facts) -> str:
    """Return `.eval_results/hybridquant.yaml`: the same numbers in the Hub's format."""
    entries = []
    for task in _benchmarks(facts):
        entries.append(
            EvalResultEntry(
                dataset_id=task.dataset or OWN_TASKS,
                task_id=task.name,
                value=percent(task.variant),
                notes=f"{task.items} items; BF16 {percent(task.reference)}; {_difference(task)}",
            )
        )
    return yaml.safe_dump(
        eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True, width=100
    )


def write_card(facts: Facts, text: str) -> None:
    """Write README.md and, where tasks were measured, `.eval_results/`."""
    write_text(facts.directory / README, text)
    if facts.all_tasks:
        path = facts.directory / EVAL_RESULTS
        path.parent.mkdir(exist_ok=True)
        write_text(path, eval_results_text(facts))


def is_our_card(directory: Path) -> bool:
    """Return whether README.md is a card of ours, not the source's or somebody's."""
    path = directory / README
    if not path.exists():
        return False
    return MARK.encode() in read_small_file(path, directory)


def percent(share: float) -> float:
    """Return a share in percent, with two decimals."""
    return round(100 * share, 2)


def find_verdict(directory: Path, source: Path | None) -> Verdict:
    """Run the verifier."""
    from export.verify import verify

    return Verdict(tuple(verify(directory, source)), source is not None)


def _benchmarks(facts: Facts) -> list[Task]:
    """The rows of single tasks: means are left out, and so is what nobody answered."""
    return [task for task in facts.all_tasks if mean_task([task]) is None and task.items]


def _eval_result(task: Task) -> EvalResult:
    return EvalResult(
        task_type=PIPELINE,
        dataset_type=task.dataset or OWN_TASKS,
        dataset_name=task.name,
        dataset_config=task.name,  # results of one dataset and configuration are merged into one
        metric_type="accuracy",
        metric_name="accuracy, percent",
        metric_value=percent(task.variant),
    )


def _difference(task: Task) -> str:
    text = f"difference {percent(task.difference):+.2f}"
    if task.low is not None and task.high is not None:
        text += f", 95 % interval {percent(task.low):+.2f} to {percent(task.high):+.2f}"
    return text


def _base_model(model: str) -> str | None:
    """The Hub's name of what a recipe names as its source; None where only the user can know."""
    cached = _CACHED.search(model)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    folder = model.rstrip("/").rpartition("/")[2]
    return _RELEASED.get(folder)


def _readme_metadata(directory: Path) -> dict[str, Any]:
    """Base model and licence by the metadata of README.md, the source's or an earlier card of ours.

    The source's own `base_model` is not this model's: it names what the source was made from.
    """
    path = directory / README
    if not path.exists():
        return {}
    try:
        data = ModelCard(read_small_file(path, directory).decode("utf-8", "replace")).data
    except (BadInput, ValueError, yaml.YAMLError) as error:
        logger.warning("%s: its metadata cannot be read: %s", path, shortened(error))
        return {}
    names = ["license", "license_name", "license_link"]
    if is_our_card(directory):
        names.append("base_model")
    found = {name: data.get(name) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, str)}
