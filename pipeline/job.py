"""A checked run: everything that a recipe names, opened and checked before weights load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from accuracy.agreement import States
from calibrate.prompts import Prompt
from calibrate.samples import Skipped
from checkpoint.faults import raise_if_any, shortened
from checkpoint.libraries import installed_versions
from checkpoint.log import get_logger
from checkpoint.opened import Checkpoint
from checkpoint.processes import Processes
from checkpoint.reading import hub_revision
from checkpoint.run_state import RunState, file_stamp, identity_of
from export.manifest import Manifest
from pipeline.inputs import (
    media_digests,
    open_source,
    prompts_of,
    source_digests,
    trained_on_sources,
    training_sample_faults,
    training_samples,
)
from quantize.algorithms import algorithm_faults
from quantize.distill.plan import DistillationPlan, plan_distillation
from quantize.layerwise import FinishedLayer
from quantize.policy import Policy, make_policy
from quantize.sensitivity import Search, search_faults
from recipes.schema import Recipe

logger = get_logger(__name__)

_NOT_IDENTITY = {
    "quantize": ("memory", "host_memory_gb", "batch_tokens"),
    "calibrate": ("max_skipped",),
    "distill": ("max_skipped", "patience", "gradient_checkpointing"),
}
"""Fields of the sections that change how a run goes or where it stops, not what comes out: a run
that was stopped by one of them is resumed with another value.
"""


@dataclass(frozen=True)
class Job:
    """A checked run.

    Attributes:
        recipe: The recipe.
        checkpoint: The BF16 checkpoint.
        policy: Format of every linear.
        device: Where layers run.
        processes: This process among those of the run.
        state: What the run leaves on disk to be resumed from.
        distillation: The checked distillation; None for PTQ.
        search: The scores that `quantize.auto` chose the policy by; None without it.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    policy: Policy
    device: str
    processes: Processes
    state: RunState
    distillation: DistillationPlan | None
    search: Search | None = None

    def calibration_prompts(self, skipped: Skipped) -> Iterator[Prompt]:
        """Open the prompts that ranges are calibrated on."""
        section = self.recipe.calibrate
        video = self.recipe.video
        limit = section.max_length
        return prompts_of(section, "calibrate", self.checkpoint, video, skipped, limit)

    def warn_of_fewer(self, section: str, samples: int) -> None:
        """Log, in the first process, when a section's sources held fewer samples than it asks for.

        Args:
            section: `calibrate` or `accuracy`.
            samples: Usable samples that were found, by all processes together.
        """
        asked = getattr(self.recipe, section).samples
        if samples < asked and self.processes.is_first:
            message = "%s.sources: %d samples, where %s.samples asks for %s"
            logger.warning(message, section, samples, section, f"{asked:,}")

    def held_out_prompts(self) -> Iterator[Prompt]:
        """Open the prompts that BF16 and the result are compared on."""
        section = self.recipe.accuracy
        skipped = Skipped(section.max_skipped)
        return prompts_of(section, "accuracy", self.checkpoint, self.recipe.video, skipped)


def open_job(recipe: Recipe, device: str, processes: Processes) -> Job:
    """Open and check everything that a recipe names; nothing is written.

    Raises:
        BadInput: With what is wrong.
    """
    checkpoint = open_source(recipe)
    quantize = recipe.quantize
    family = checkpoint.config.family
    policy = make_policy(quantize.layers, checkpoint.linears, quantize.kv_cache, family)
    distils = recipe.distill is not None
    faults = list(algorithm_faults(quantize.algorithm, policy, distils=distils))
    faults += search_faults(quantize.auto, distils)
    raise_if_any(faults)
    state = RunState(recipe.output, _identity(recipe, checkpoint, device, processes))
    distillation = _plan_distillation(recipe, checkpoint, policy, state, device, processes)
    return Job(recipe, checkpoint, policy, device, processes, state, distillation)


def _plan_distillation(
    recipe: Recipe,
    checkpoint: Checkpoint,
    policy: Policy,
    state: RunState,
    device: str,
    processes: Processes,
) -> DistillationPlan | None:
    section = recipe.distill
    if section is None:
        return None
    skipped = Skipped(section.max_skipped, repeats=True)
    next(training_samples(section, skipped))  # a source that does not exist is reported now
    raise_if_any(training_sample_faults(section))
    if processes.is_first:
        for name in trained_on_sources(section, recipe.accuracy):
            message = "accuracy.sources: %s is trained on as well, so the gate is not held out"
            logger.warning(message, shortened(name))
    return plan_distillation(
        section,
        partial(training_samples, section),
        skipped,
        checkpoint,
        policy,
        recipe.video,
        state.directory / "distill",
        processes,
        device,
        lambda step: state.record(distilled=step),
    )


def _identity(
    recipe: Recipe, checkpoint: Checkpoint, device: str, processes: Processes
) -> dict[str, object]:
    """What must be the same for a run to be resumed, by dotted name."""
    weights = sorted(checkpoint.directory.glob("*.safetensors"))
    parts = recipe.model_dump(mode="json", exclude={"output", "device", "serve", "accuracy"})
    for section, names in _NOT_IDENTITY.items():
        if parts[section] is not None:
            for name in names:
                del parts[section][name]
    accuracy = recipe.accuracy.model_dump(mode="json")
    parts["accuracy"] = {name: accuracy[name] for name in ("sources", "samples", "seed")}
    parts["source"] = {file.name: file_stamp(file) for file in weights}
    parts["companions"] = dict(checkpoint.companions.digests)
    parts["config"] = dict(checkpoint.config.raw)
    parts["samples"] = source_digests(recipe)
    parts["media"] = media_digests(recipe)
    parts["versions"] = installed_versions()
    parts["processes"] = processes.count
    parts["device"] = device.partition(":")[0]
    return identity_of(parts)


@dataclass(frozen=True)
class Record:
    """What a way reports about a run, for the manifest.

    Attributes:
        calibration: Samples, tokens, skipped samples and a hash of each prompt.
        distillation: The course of the training; empty for PTQ.
    """

    calibration: dict[str, object]
    distillation: dict[str, object]


class Way(Protocol):
    """How a run holds the model in memory: whole, or layer by layer."""

    def progress(self) -> str:
        """How far the run has come, for an out-of-memory message."""

    def packed_layers(self, drain: Callable[[], None]) -> Iterator[FinishedLayer]:
        """Calibrate and quantize; yield every layer that is still to be written, packed.

        Every process must exhaust it; the first one writes.

        Args:
            drain: Waits until every yielded layer is on the disk.
        """

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor that is written without being quantized, by its checkpoint name."""

    def on_written(self, layer: int) -> None:
        """Called when a layer and all before it are on the disk."""

    def record(self) -> Record:
        """What is known about the run after `packed_layers`."""

    def reference(self) -> list[States]:
        """BF16's states of the held-out prompts, in their order."""

    def read_back(self) -> tuple[list[States], nn.Module]:
        """The written directory's states of the held-out prompts, and its `lm_head`."""


def make_manifest(job: Job, record: Record, source_weights: Mapping[str, str]) -> Manifest:
    """The manifest of a job's result, before it is verified and measured.

    Args:
        job: The run.
        record: What its way reports.
        source_weights: SHA-256 of the source's weight files.
    """
    recipe = job.recipe.model_dump(mode="json")
    calibration: dict[str, object] = {"algorithm": job.recipe.quantize.algorithm}
    calibration |= record.calibration
    calibration["files"] = source_digests(job.recipe)
    companions = job.checkpoint.companions
    files = {**source_weights, **companions.digests, "config.json": companions.config_digest}
    return Manifest(
        recipe=recipe,
        versions=installed_versions(),
        formats=job.policy.counts(),
        calibration=calibration,
        video=job.recipe.video,
        serve=recipe["serve"],
        distillation=dict(record.distillation),
        source={"revision": hub_revision(job.checkpoint.directory), "files": files},
    )
