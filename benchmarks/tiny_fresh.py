"""Compares exports of the tiny checkpoint on items that nothing was chosen on.

    python -m benchmarks.tiny_fresh --work DIR --json FILE --series 12 \\
        --items text=1000,chart=200 --forms bf16=DIR,nvfp4=DIR,qad=DIR [--served bf16,nvfp4,qad]

Every form answers the same items of the calibration split, of a series that no recipe draws and no
choice was made on. What a distilled form wins back of NVFP4's loss has a 95 % interval: a paired
bootstrap over the items. Items are asked in parts, and the forms take turns: the same command
resumes a measurement that was stopped, and what is there is compared as far as it goes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from accuracy.scoring import score
from benchmarks.parts import Parts, write_json
from calibrate.samples import Sample
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import BadInput, Fault, main, nearest
from checkpoint.libraries import installed_versions, prepare_libraries
from checkpoint.log import get_logger
from checkpoint.video import UNPRUNED
from tiny.tasks import TASKS, items

logger = get_logger(__name__)

REFERENCE = "bf16"
PTQ = "nvfp4"
SPLIT = "calibration"
_PART = 500
"""Items that every form is asked before the next ones."""
_RESAMPLES = 10_000
_SERVED = "served"

Answer = Callable[[Sequence[Sample]], Sequence[str | None]]
ByTask = Mapping[str, NDArray[np.float64]]
Marks = dict[str, dict[str, NDArray[np.float64]]]
"""1 for right and 0 for wrong answers, by form and task; of the items asked so far."""


@dataclasses.dataclass(frozen=True)
class WonBack:
    """The share of PTQ's loss that a form wins back.

    Attributes:
        share: 1 if all is won back, below 0 if the form is worse than PTQ.
        low: Lower end of the 95 % interval.
        high: Upper end.
    """

    share: float
    low: float
    high: float


def won_back(
    reference: ByTask,
    ptq: ByTask,
    form: ByTask,
) -> WonBack | None:
    """Return what a form wins back of the mean over the tasks; None if PTQ loses nothing.

    The interval is that of the quotient, by a paired bootstrap: in each of 10,000 resamples, all
    three have answered the same items (Efron and Tibshirani 1993, chapter 13).

    Args:
        reference: Marks by task.
        ptq: Those of PTQ, of the same items.
        form: Those of the form.
    """
    random = np.random.default_rng(0)
    lost = np.zeros(_RESAMPLES + 1)
    won = np.zeros(_RESAMPLES + 1)
    for task, right in reference.items():
        rows = _resampled(len(right), random)
        lost += (right - ptq[task])[rows].mean(1)
        won += (form[task] - ptq[task])[rows].mean(1)
    if lost[0] <= 0:
        return None
    # A resample without a loss has no share; it counts as unbounded.
    shares = np.where(lost[1:] > 0, won[1:] / np.maximum(lost[1:], 1e-12), np.inf)
    low, high = np.quantile(shares, [0.025, 0.975])
    return WonBack(float(won[0] / lost[0]), float(low), float(high))


def _resampled(count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return indices of items, [1 + resamples, count]; the first row is what was measured."""
    picked = random.integers(0, count, (_RESAMPLES, count))
    return np.concatenate([np.arange(count)[None], picked])


def compared(marks: Marks) -> dict[str, Any]:
    """Compare every form with BF16, and its share won back with PTQ.

    Args:
        marks: Of all forms; each is compared on the items that BF16, PTQ and itself were asked.

    Returns:
        By form: `items`, `right` (shares by task, and their mean), `points` against BF16 with
        `interval`, and for all but BF16 and PTQ `won_back` of the mean and of each task that PTQ
        loses in.
    """
    found = {}
    for form, tasks in marks.items():
        others = _compared_with(marks, form)
        common = _common([*others, tasks])
        if not common:
            continue
        reference, ptq, ours = (
            {task: side[task][:count] for task, count in common.items()}
            for side in (*others, tasks)
        )
        entry: dict[str, Any] = {"items": common}
        shares = {task: float(right.mean()) for task, right in ours.items()}
        entry["right"] = shares | {"mean": float(np.mean(list(shares.values())))}
        name = form.removesuffix(f", {_SERVED}")
        if name != REFERENCE:
            entry |= _points(reference, ours)
        if name not in (REFERENCE, PTQ):
            entry["won_back"] = _shares(reference, ptq, ours)
        found[form] = entry
    return found


def _compared_with(marks: Marks, form: str) -> tuple[ByTask, ByTask]:
    """BF16 and PTQ, both served if the form is served and they are too."""
    others = []
    for name in (REFERENCE, PTQ):
        alike = f"{name}, {_SERVED}"
        is_served = form.endswith(_SERVED) and alike in marks
        others.append(marks.get(alike if is_served else name, {}))
    return others[0], others[1]


def _common(sides: Sequence[ByTask]) -> dict[str, int]:
    """Items by task that all sides have answered."""
    common = {}
    for task in sides[-1]:
        count = min(len(side.get(task, ())) for side in sides)
        if count:
            common[task] = count
    return common


def _points(reference: ByTask, ours: ByTask) -> dict[str, Any]:
    """The difference of the means over the tasks, in points, with its 95 % interval."""
    random = np.random.default_rng(0)
    differences = np.zeros(_RESAMPLES + 1)
    for task, right in reference.items():
        rows = _resampled(len(right), random)
        differences += 100 * (ours[task] - right)[rows].mean(1) / len(reference)
    low, high = np.quantile(differences[1:], [0.025, 0.975])
    interval = [round(float(low), 2), round(float(high), 2)]
    return {"points": round(float(differences[0]), 2), "interval": interval}


def _shares(
    reference: ByTask,
    ptq: ByTask,
    ours: ByTask,
) -> dict[str, Any]:
    shares = {}
    for name, tasks in {"mean": list(reference), **{task: [task] for task in reference}}.items():
        selected = [{task: side[task] for task in tasks} for side in (reference, ptq, ours)]
        share = won_back(*selected)
        if share is not None:
            rounded = {key: round(value, 3) for key, value in dataclasses.asdict(share).items()}
            shares[name] = rounded
    return shares


class Asked:
    """Answers of every form, part by part.

    Attributes:
        samples: Items by task.
        marks: What is known so far.
    """

    def __init__(self, samples: Mapping[str, Sequence[Sample]], parts: Parts) -> None:
        self.samples = samples
        self.marks: Marks = {}
        self._parts = parts

    def ask(self, form: str, task: str, start: int, answer: Answer) -> None:
        """Ask one part of a task, unless it was asked before.

        Args:
            form: Name of the form.
            task: A key of `samples`.
            start: Position of the part's first item.
            answer: Lets the form answer samples.
        """
        samples = self.samples[task][start : start + _PART]

        def right() -> dict[str, Any]:
            pairs = zip(answer(samples), samples, strict=True)
            return {"right": [int(score(given, sample)) for given, sample in pairs]}

        found = self._parts.part(f"{form} {task} {start}", right)["right"]
        logger.info("%s: %d of %d %s right", form, sum(found), len(found), task)
        tasks = self.marks.setdefault(form, {})
        before = tasks.get(task, np.zeros(0))
        tasks[task] = np.concatenate([before, np.array(found, dtype=np.float64)])


def _ordered(samples: Sequence[Sample]) -> list[Sample]:
    """Sort items by the length of their texts, in an order of their own parts.

    Prompts of equal length are decoded together. Parts are dealt out so that each has items of all
    lengths: a measurement that is stopped has answered a fair share of them.
    """
    by_length = sorted(samples, key=_text_length)
    count = -(-len(by_length) // _PART)
    dealt = []
    for part in range(count):
        dealt += by_length[part::count]
    return dealt


def _text_length(sample: Sample) -> int:
    return len(str(sample.messages[-1]["content"]))


@contextlib.contextmanager
def _answering(form: str, directory: Path, flags: Sequence[str]) -> Iterator[Answer]:
    """Yield a function that answers samples with a form, in process or served by vLLM."""
    if form.endswith(f", {_SERVED}"):
        from accuracy.endpoint import ask_endpoint
        from serve.process import running_server
        from serve.settings import ServeSettings

        settings = ServeSettings(port=0, video=UNPRUNED)
        with running_server(directory, settings, flags) as server:
            yield lambda samples: ask_endpoint(server.url, {"": samples})[""]
        return
    from accuracy.answers import generate
    from checkpoint.opened import open_checkpoint
    from export.load import load_exported

    checkpoint = open_checkpoint(directory)
    model = load_exported(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    yield lambda samples: generate(
        model, checkpoint.config, checkpoint.tokenizer, samples, UNPRUNED
    )


def _pairs(text: str, option: str) -> dict[str, str]:
    """Read `name=value` pairs that are separated by commas."""
    found = {}
    for pair in text.split(","):
        name, equals, value = pair.partition("=")
        if not equals or not value:
            raise BadInput(Fault(option, f"{pair!r} is not NAME=VALUE", "as in nvfp4=DIR"))
        found[name] = value
    return found


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.tiny_fresh", __doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the answers so far")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    parser.add_argument("--series", type=int, default=12, help="of the items; never 0 or 1")
    parser.add_argument("--items", default="text=1000", help="items by task")
    parser.add_argument("--forms", required=True, help="directories by form; bf16 is one of them")
    parser.add_argument("--served", default="", help="those of the forms that vLLM serves instead")
    parser.add_argument("--vllm", default="", metavar="FLAGS", help="more flags of vllm serve")
    return parser


def _counts(text: str) -> dict[str, int]:
    counts = {}
    for task, count in _pairs(text, "--items").items():
        if task not in TASKS:
            raise BadInput(Fault("--items", f"unknown task {task!r}", nearest(task, TASKS)))
        if not count.isdigit() or int(count) < 1:
            raise BadInput(Fault("--items", f"{task}={count} is no number", "as in text=1000"))
        counts[task] = int(count)
    return counts


def measure(
    forms: Mapping[str, Path],
    served: Sequence[str],
    asked: Asked,
    flags: Sequence[str],
) -> None:
    """Let every form answer every item.

    Args:
        forms: Directories by name.
        served: Those of the forms that vLLM serves, one server after another.
        asked: Takes the answers.
        flags: More flags of `vllm serve`.
    """
    in_process = [form for form in forms if form not in served]
    with contextlib.ExitStack() as stack:
        answers = {}
        for form in in_process:
            answers[form] = stack.enter_context(_answering(form, forms[form], flags))
        for task, start in _starts(asked.samples):
            for form, answer in answers.items():
                asked.ask(form, task, start, answer)
    for form in served:
        with _answering(f"{form}, {_SERVED}", forms[form], flags) as answer:
            for task, start in _starts(asked.samples):
                asked.ask(f"{form}, {_SERVED}", task, start, answer)


def _starts(samples: Mapping[str, Sequence[Sample]]) -> Iterator[tuple[str, int]]:
    for task, given in samples.items():
        for start in range(0, len(given), _PART):
            yield task, start


def _show(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a row for each form."""
    table = Table(
        title="accuracy in percent; won back with its 95 % interval", title_justify="left"
    )
    tasks = list(next(iter(found.values()))["right"]) if found else []
    for column in ("form", *tasks, "won back", "of text"):
        table.add_column(column)
    for form, entry in found.items():
        row = [f"{100 * entry['right'][task]:.1f}" for task in tasks if task in entry["right"]]
        shares = entry.get("won_back", {})
        for name in ("mean", "text"):
            share = shares.get(name)
            row.append(
                "" if share is None else "{share:.0%} ({low:.0%} … {high:.0%})".format(**share)
            )
        table.add_row(form, *row)
    Console().print(table)


def _run() -> int:
    given = parse_command(_parser())
    counts = _counts(given.items)
    directories = _pairs(given.forms, "--forms")
    forms = {name: Path(directory) for name, directory in directories.items()}
    served = [name for name in given.served.split(",") if name]
    for name in (REFERENCE, *served):
        if name not in forms:
            raise BadInput(Fault("--forms", f"has no {name}", f"add {name}=DIR"))
    if given.series in (0, 1):
        what = f"{given.series} is drawn by recipes or was chosen on"
        raise BadInput(Fault("--series", what, "give another"))
    prepare_libraries()
    samples = {}
    for task, count in counts.items():
        samples[task] = _ordered(items(task, SPLIT, count, given.series))
    given.work.mkdir(parents=True, exist_ok=True)
    asked = Asked(samples, Parts(given.work / "fresh.json", {"series": given.series, **counts}))
    try:
        measure(forms, served, asked, shlex.split(given.vllm))
    finally:
        found = compared(asked.marks)
        _show(found)
        options = [f"--series={given.series}", f"--items={given.items}"]
        options += [f"--forms={','.join(f'{name}=DIR' for name in forms)}"]
        options += [f"--served={given.served}"]
        command = shlex.join(["python", "-m", "benchmarks.tiny_fresh", *options])
        result = {"command": command, "versions": installed_versions(), "forms": found}
        write_json(given.json, result)
    return 0


if __name__ == "__main__":
    main(_run)
