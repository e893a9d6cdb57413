"""The end of every run: what is on disk is read back, compared with BF16, and the gate decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from accuracy.agreement import States, compare
from accuracy.answers import answer_tasks
from accuracy.gate import judge, show
from accuracy.paired import Paired, pair
from checkpoint.faults import Fault
from checkpoint.opened import open_checkpoint
from export.manifest import file_digests, read_manifest, write_manifest
from pipeline.job import Job
from pipeline.times import Times
from tiny.tasks import items


def measure(
    job: Job,
    reference: Callable[[], Sequence[States]],
    read_back: Callable[[], tuple[Sequence[States], nn.Module]],
) -> dict[str, Any]:
    """Compare the written directory with BF16.

    Args:
        job: The run.
        reference: Returns BF16's states of the held-out prompts.
        read_back: Returns those of the directory read back, and its `lm_head`.

    Returns:
        The gate's outcome, for the manifest.
    """
    states, lm_head = read_back()
    image_token = job.checkpoint.config.image_token_id
    agreement = compare(reference(), states, lm_head, image_token)
    verdict = judge(agreement, job.recipe.accuracy, _task_rows(job))
    show(verdict)
    return verdict.as_dict()


def gate_of_faults(faults: Sequence[Fault]) -> dict[str, Any]:
    """Return the gate's outcome where verification has found faults."""
    return {"passed": False, "missed": [str(fault) for fault in faults]}


def finish_manifest(
    job: Job, gate: dict[str, Any], weights: Mapping[str, str], times: Times
) -> None:
    """Complete the manifest of the output; nothing is written after it.

    Args:
        job: The run.
        gate: The gate's outcome.
        weights: SHA-256 of the output's weight files; empty where they were not read.
        times: How long the steps took.
    """
    output = job.recipe.output
    manifest = read_manifest(output)
    assert manifest is not None
    files = file_digests(output, weights)
    finished = dataclasses.replace(manifest, gate=gate, files=files, times=times.as_dict())
    write_manifest(output, finished)


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
