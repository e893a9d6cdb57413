"""The way of a run that holds the whole model in the device's memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from accuracy.agreement import States, final_states
from calibrate.forward import embed_all, forward_loop
from calibrate.samples import Skipped
from checkpoint.log import get_logger
from checkpoint.native import load_model
from checkpoint.opened import open_checkpoint
from export.load import load_exported
from pipeline.job import Job, Record
from pipeline.layer_state import PromptDigest
from quantize.algorithms import ALGORITHMS
from quantize.distill.student import frozen_copy
from quantize.distill.training import distill, trained_tensors
from quantize.layerwise import FinishedLayer, layer_policy
from quantize.ptq import packed_linears, quantize_model

if TYPE_CHECKING:
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3

logger = get_logger(__name__)


class WholeModel:
    """Quantizes the model in place.

    BF16 runs over the held-out prompts before it is quantized. A run that was killed after the last
    step of a distillation, or after writing, loads and calibrates BF16 again.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._reference: list[States] | None = None
        self._record = Record({}, {})
        self._trained: dict[str, torch.Tensor] = {}

    def progress(self) -> str:
        """How far the run has come, for an out-of-memory message."""
        return "the run ran out of memory with the whole model"

    def packed_layers(self, drain: Callable[[], None]) -> Iterator[FinishedLayer]:
        """Calibrate, quantize and distil; yield every layer of the result, packed.

        On every process but the first, nothing is yielded.
        """
        job = self._job
        model = load_model(job.checkpoint, job.device)
        self._reference = self._reference_states(model)
        teacher = None
        if job.distillation is not None and job.distillation.is_taught:
            teacher = frozen_copy(model.language_model)
        calibration = self._calibrate(model)
        distillation: dict[str, object] = {}
        if job.distillation is not None:
            distilled = distill(job.distillation, model, teacher)
            distillation = dataclasses.asdict(distilled)
            self._trained = trained_tensors(job.distillation, model.language_model, distilled)
            if job.processes.is_first:
                logger.info("distilled: %s", distilled)
        del teacher
        self._record = Record(calibration, distillation)
        if not job.processes.is_first:
            return
        for layer in range(job.checkpoint.config.depth):
            part = layer_policy(job.policy, job.checkpoint.config, layer)
            packed = tuple(packed_linears(model.language_model, part))
            yield FinishedLayer(layer, packed)

    def _calibrate(self, model: NemotronH_Omni_Reasoning_V3) -> dict[str, object]:
        job = self._job
        quantize = job.recipe.quantize
        config = job.checkpoint.config
        total = job.recipe.calibrate.samples
        skipped = Skipped(job.recipe.calibrate.max_skipped)
        digest = PromptDigest()
        prompts = digest.over(job.calibration_prompts(skipped))
        if ALGORITHMS[quantize.algorithm].repeats:
            given = embed_all(model, prompts, config, total)
            loop = functools.partial(forward_loop, model, given, config, total=total)
        else:
            loop = functools.partial(forward_loop, model, prompts, config, total=total)
        counts = quantize_model(
            model.language_model, job.policy, loop, quantize.algorithm, quantize.gptq_damping
        )
        for fault in skipped.faults:
            logger.warning("skipped: %s", fault)
        job.warn_of_fewer("calibrate", counts.samples)
        return dataclasses.asdict(counts) | {"skipped": skipped.samples, "digests": digest.each}

    def _reference_states(self, model: NemotronH_Omni_Reasoning_V3) -> list[States]:
        states = self._states(model, "BF16 answers")
        self._job.warn_of_fewer("accuracy", len(states))
        return states

    def _states(self, model: NemotronH_Omni_Reasoning_V3, describe: str) -> list[States]:
        config = self._job.checkpoint.config
        return final_states(model, self._job.held_out_prompts(), config, describe)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor that is written without being quantized: trained, or the source's."""
        if name in self._trained:
            return self._trained[name].cpu()
        return self._job.checkpoint.tensors.read(name)

    def on_written(self, layer: int) -> None:
        """Nothing is recorded: a run that was killed while it wrote starts again."""

    def record(self) -> Record:
        """What is known about the run after `packed_layers`."""
        return self._record

    def reference(self) -> list[States]:
        """BF16's states of the held-out prompts; loads BF16 again in a resumed run."""
        if self._reference is None:
            model = load_model(self._job.checkpoint, self._job.device)
            self._reference = self._reference_states(model)
        return self._reference

    def read_back(self) -> tuple[list[States], nn.Module]:
        """The written directory's states of the held-out prompts, and its `lm_head`."""
        exported = open_checkpoint(self._job.recipe.output)
        model = load_exported(exported, self._job.device)
        return self._states(model, "quantized answers"), model.language_model.lm_head
