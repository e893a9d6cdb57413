"""The end of every run: what is on disk is read back, compared with BF16, and the gate decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from accuracy.agreement import States, compare
from accuracy.answers import answer_tasks
from accuracy.gate import judge, show
from accuracy.paired import Paired, pair
from checkpoint.faults import Fault
from checkpoint.opened import open_checkpoint
from export.manifest import read_manifest, write_manifest
from pipeline.job import Job
from tiny.tasks import items


def measure(
    job: Job,
    reference: Callable[[], Sequence[States]],
    read_back: Callable[[], tuple[Sequence[States], nn.Module]],
) -> bool:
    """Compare the written directory with BF16 and write the gate's outcome into its manifest.

    Args:
        job: The run.
        reference: Returns BF16's states of the held-out prompts.
        read_back: Returns those of the directory read back, and its `lm_head`.

    Returns:
        Whether the gate passed.
    """
    answers, lm_head = read_back()
    image_token = job.checkpoint.config.image_token_id
    agreement = compare(reference(), answers, lm_head, image_token)
    verdict = judge(agreement, job.recipe.accuracy, _task_rows(job))
    show(verdict)
    record_gate(job, verdict.as_dict())
    return verdict.passed


def record_faults(job: Job, faults: Sequence[Fault]) -> None:
    """Mark the written directory as failed by the faults of its verification."""
    record_gate(job, {"passed": False, "missed": [str(fault) for fault in faults]})


def record_gate(job: Job, gate: dict[str, Any]) -> None:
    """Write the gate's outcome into the manifest of the output."""
    manifest = read_manifest(job.recipe.output)
    assert manifest is not None
    write_manifest(job.recipe.output, dataclasses.replace(manifest, gate=gate))


def _task_rows(job: Job) -> list[Paired]:
    """The tasks' test items, answered by BF16 and by the output; empty if none are asked."""
    tasks = job.recipe.accuracy.tasks
    if tasks is None:
        return []
    samples = {name: items(name, count=tasks.items) for name in tasks.names}
    exported = open_checkpoint(job.recipe.output)
    video = job.recipe.video
    reference = answer_tasks(job.checkpoint, samples, video, job.device)
    variant = answer_tasks(exported, samples, video, job.device)
    return pair(samples, reference, variant)
