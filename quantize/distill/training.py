"""Quantization-aware distillation: the quantized language model learns the BF16 model's next-token
distributions.

For comparison it can learn the samples' own tokens instead (QAT): no teacher, cross-entropy,
everything else the same.

Weights train in float32 under ModelOpt's fake quantization; ranges stay as calibrated (NVFP4's
block scales follow the weights).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calibrate.samples import Sample
from checkpoint.files import DTYPES
from checkpoint.log import get_logger
from checkpoint.memory import memory_advice
from checkpoint.products import float32_products
from quantize.distill.checkpoints import (
    BEST,
    WEIGHTS,
    last_checkpoint,
    remove_partial,
    step_of,
)
from quantize.distill.dataset import TrainingDataset
from quantize.distill.fused import fused_elementwise
from quantize.distill.guards import check_ranges, copied_ranges
from quantize.distill.packing import kept_apart
from quantize.distill.plan import DistillationPlan
from quantize.distill.rows import Prepared, Row, prepare, row_of_sample
from quantize.distill.student import embedding_only, trainable
from quantize.distill.trainer import DistillationTrainer
from quantize.distill.weights import (
    Trained,
    Weight,
    gather_model,
    load_ranges,
    load_weights,
    share_ranges,
)
from quantize.ptq import share_fused_scales

if TYPE_CHECKING:
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3

logger = get_logger(__name__)


@dataclass(frozen=True)
class Distilled:
    """What came of a distillation.

    Attributes:
        trained: Names of the tensors that have trained. A step may be too small to leave a trace in
            BF16, so some may be the source's still.
        loss: What was learnt, and by what the best step was chosen: `KL` from BF16, or
            `cross-entropy`.
        steps: Optimizer steps made.
        best_step: The step whose weights were kept, by the held-out loss; 0 when no step was better
            than PTQ.
        tokens: Tokens trained on by this process, visual ones included.
        held_out: (step, mean loss in nats per token) of the held-out samples' answers; step 0 is
            the PTQ model.
        losses: (step, loss in nats) of the training samples: that of each token times its weight,
            divided by their number. With a prompt weight below 1 it is smaller than a mean.
    """

    trained: tuple[str, ...]
    loss: str
    steps: int
    best_step: int
    tokens: int
    held_out: tuple[tuple[int, float], ...]
    losses: tuple[tuple[int, float], ...]

    def __str__(self) -> str:
        held_out = dict(self.held_out)
        gain = f"held-out {self.loss} {held_out[0]:.5f} → {held_out[self.best_step]:.5f} nats"
        if self.best_step:
            return f"{gain} at step {self.best_step} of {self.steps}"
        return f"{gain}: PTQ's weights kept"


@memory_advice(
    lambda: "distillation ran out of memory",
    "start more processes under FSDP2, give distill.gradient_checkpointing=true "
    "or lower distill.max_length",
)
def distill(
    plan: DistillationPlan, model: NemotronH_Omni_Reasoning_V3, teacher: nn.Module | None
) -> Distilled:
    """Train the quantized language model in place, from the newest checkpoint in the plan's
    directory on.

    Args:
        plan: Checked.
        model: Its language model quantized and calibrated. Afterwards the trained weights are
            float32, and on the first process the whole model is there, on the CPU if it was
            sharded.
        teacher: `frozen_copy` of the language model from before its quantization; None when the
            plan has none.

    Raises:
        BadInput: Too many bad samples, a loss that is not finite, or one that stays above the PTQ
            model's.
        RuntimeError: A guard found a defect: a quantizer that is not called, a gradient that is
            missing or in excess, a range that changed.
    """
    student = model.language_model
    # The export will share them: what is trained must be what is served.
    share_fused_scales(student, plan.policy)
    trained = find_trained(plan, student)
    plan.directory.mkdir(parents=True, exist_ok=True)
    remove_partial(plan)
    # Samples are embedded by BF16's embeddings, so they are copied before they can train.
    with (
        float32_products(),
        embedding_only(model),
        trainable(student, trained),
        kept_apart(student),
        fused_elementwise(),
    ):
        dataset = _make_dataset(plan, model)
        if plan.processes.is_first:
            logger.info("PTQ's loss on %d held-out samples comes first", plan.settings.held_out)
        held_out = dataset.held_out()
        trainer = DistillationTrainer(plan, student, teacher, trained, dataset, held_out)
        share_ranges(student, plan.processes)
        last = last_checkpoint(plan.directory)
        if last is not None:
            # A GPU may have calibrated another bit this time.
            load_ranges(trained.linears, last / WEIGHTS)
        ranges = copied_ranges(trained.linears)
        if last is not None and step_of(last) == plan.settings.steps:
            trainer.restore_finished(last)  # the run was killed during the export
        else:
            with _frozen_garbage():
                trainer.train(resume_from_checkpoint=str(last) if last else None)
        gather_model(student, plan.processes)
    check_ranges(trained.linears, ranges)
    best = 0
    if plan.processes.is_first:
        best = load_weights(trained, plan.directory / BEST)
        dataset.warn_of_unanswered()
    result = _result(plan, trainer, best)
    del trainer
    # It refers to itself, and holds gradients and moments whose memory the export needs.
    gc.collect()
    return result


def find_trained(plan: DistillationPlan, student: nn.Module) -> Trained:
    """Return what a plan trains, in a quantized language model."""
    family = plan.checkpoint.config.family
    quantized = set(plan.policy.quantized)
    weights = {}
    linears = {}
    for name in plan.trained:
        path, _, key = family.native_module(name).rpartition(".")
        module = student.get_submodule(path)
        weights[name] = Weight(module, key)
        owner = name.rpartition(".")[0]
        if owner in quantized:
            linears[owner] = module
    return Trained(weights, linears)


def trained_tensors(
    plan: DistillationPlan, model: nn.Module, distilled: Distilled
) -> dict[str, torch.Tensor]:
    """Return the trained tensors that are not quantized, as they are written, by name in the
    checkpoint.

    Args:
        plan: Of the distillation.
        model: The language model after it.
        distilled: What came of it.
    """
    found = find_trained(plan, model)
    tensors = {}
    for name in distilled.trained:
        if name.rpartition(".")[0] not in found.linears:
            dtype = DTYPES[plan.checkpoint.layout[name].dtype]
            tensors[name] = found.weights[name].parameter.detach().to(dtype)
    return tensors


def _make_dataset(plan: DistillationPlan, model: NemotronH_Omni_Reasoning_V3) -> TrainingDataset:
    settings = plan.settings
    return TrainingDataset(
        plan.samples,
        partial(_prepare_sample, plan),
        partial(_embed_sample, plan, model),
        plan.rates,
        settings.held_out,
        settings.seed,
        plan.skipped,
        plan.processes,
        step_rows=settings.batch // plan.processes.count,
        pack_length=settings.pack_length,
    )


def _prepare_sample(plan: DistillationPlan, sample: Sample, rate: float) -> Prepared:
    return prepare(sample, plan.checkpoint, plan.video.with_rate(rate), plan.settings.max_length)


def _embed_sample(
    plan: DistillationPlan, model: NemotronH_Omni_Reasoning_V3, prepared: Prepared
) -> Row:
    return row_of_sample(model, prepared, plan.checkpoint.config, plan.settings.prompt_weight)


@contextlib.contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Keep the objects that exist now out of garbage collection: QADTrainer collects before every
    row.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _result(plan: DistillationPlan, trainer: DistillationTrainer, best_step: int) -> Distilled:
    losses: list[tuple[int, float]] = []
    for entry in trainer.state.log_history:
        values: dict[str, Any] = entry
        if "loss" in values:
            losses.append((values["step"], values["loss"]))
    return Distilled(
        trained=plan.trained if best_step else (),
        loss=trainer.loss_name,
        steps=trainer.state.global_step,
        best_step=best_step,
        tokens=trainer.tokens,
        held_out=tuple(trainer.history.items()),
        losses=tuple(losses),
    )
