"""The suites and their tasks: what VLMEvalKit and lm-eval call them, and what they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from checkpoint.faults import BadInput, Fault, nearest, shortened

Harness = Literal["vlmeval", "lm-eval", "needle"]


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: Ours, as in `--tasks`.
        dataset: The harness's name of the data set.
        harness: Who builds the prompts and scores the answers.
        is_video: Whether its items are clips.
        needs_judge: Whether a judge model must read the answers.
    """

    name: str
    dataset: str
    harness: Harness = "vlmeval"
    is_video: bool = False
    needs_judge: bool = False

    @property
    def source(self) -> str:
        """Where its data comes from, as in `VLMEvalKit/ChartQA_TEST`."""
        return f"{_SOURCES[self.harness]}/{self.dataset}"


_SOURCES = {"vlmeval": "VLMEvalKit", "lm-eval": "lm-eval", "needle": "hybridquant"}

REPORT = (
    Task("mmmu", "MMMU_DEV_VAL"),
    Task("mathvista", "MathVista_MINI", needs_judge=True),
    Task("ai2d", "AI2D_TEST"),
    Task("ocrbench", "OCRBench"),
    Task("ocrbench_v2", "OCRBench_v2"),
    Task("ocr_reasoning", "OCR_Reasoning", needs_judge=True),
    Task("chartqa", "ChartQA_TEST"),
    Task("docvqa", "DocVQA_VAL"),
    Task("infovqa", "InfoVQA_VAL"),
    Task("textvqa", "TextVQA_VAL"),
    Task("video_mme", "Video-MME", is_video=True),
    Task("longvideobench", "LongVideoBench", is_video=True),
)
"""The benchmarks of the technical report and of the launch post."""

NEEDLE = Task("needle", "needle", "needle")

TEXT = (
    Task("gsm8k", "gsm8k", "lm-eval"),
    Task("ifeval", "ifeval", "lm-eval"),
    Task("mmlu_generative", "mmlu_generative", "lm-eval"),
    NEEDLE,
)
"""Tasks of lm-eval whose answers are generated, and ours of finding a number in a long text."""

SUITES = {"report": REPORT, "text": TEXT}


def choose_tasks(suite: str, names: Sequence[str]) -> tuple[Task, ...]:
    """Return the tasks of a suite that are named; all when none is.

    Args:
        suite: `report` or `text`.
        names: Ours; for `text` also any task of lm-eval, which checks the name itself.

    Raises:
        BadInput: With every name that the suite does not have.
    """
    known = {task.name: task for task in SUITES[suite]}
    if not names:
        return SUITES[suite]
    if suite == "text":
        return tuple(known.get(name, Task(name, name, "lm-eval")) for name in names)
    unknown = [name for name in names if name not in known]
    if unknown:
        faults = []
        for name in unknown:
            what = f"unknown task {shortened(name, 80)!r}"
            faults.append(Fault("--tasks", what, nearest(name, known)))
        raise BadInput(*faults)
    return tuple(known[name] for name in names)
