"""Quantization-aware distillation: the quantized language model learns the BF16 model's next-token
distributions.

For comparison it can learn the samples' own tokens instead (QAT): no teacher, cross-entropy, all
else the same.

Weights train in float32 under ModelOpt's fake quantization; ranges stay as calibrated (NVFP4's
block scales follow the weights). A killed run goes on with the same command: its state is
`.NAME.qad` beside the output.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainingArguments

from calibrate.samples import Sample
from checkpoint.classes import NemotronH_Omni_Reasoning_V3
from checkpoint.config import CheckpointConfig
from checkpoint.faults import Fault, raise_if_any
from checkpoint.layout import (
    LANGUAGE_MODEL,
    TensorSpec,
    expected_tensors,
    language_model_linears,
    spec_bytes,
)
from checkpoint.memory import memory_advice
from checkpoint.native import module_name
from quantize.distill.batches import TrainingStream, batch_of
from quantize.distill.state import (
    BEST,
    WEIGHTS,
    amax_of,
    begin,
    checkpoints,
    end,
    gather,
    identity_of,
    load_ranges,
    load_weights,
    share_ranges,
    space_faults,
    stamp,
    state_bytes,
    state_faults,
)
from quantize.distill.student import embedding_only, trainable, training_bytes
from quantize.distill.trainer import DistillationTrainer
from quantize.policy import Policy
from quantize.ptq import share_fused_scales


@dataclass(frozen=True)
class Settings:
    """How to distil; `recipes.schema.Distill` says what each field means and where its default
    comes from.
    """

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    warmup: float
    train: str
    video_pruning_rates: tuple[float, ...]
    max_length: int
    max_skipped: int
    held_out: int
    save_every: int
    patience: int
    gradient_checkpointing: bool
    seed: int
    loss: str = "kl"


@dataclass(frozen=True)
class Plan:
    """A checked distillation; made by `plan_distillation` before any weight is loaded.

    Attributes:
        trained: Checkpoint names of the linears whose weights train.
        directory: Where the state is kept while it runs.
        identity: What must be the same for a run to be taken up again.
        device: `cpu` or `cuda`, with the process's number under a launcher.
    """

    settings: Settings
    trained: tuple[str, ...]
    directory: Path
    identity: Mapping[str, Any]
    samples: Callable[[], Iterator[Sample]]
    config: CheckpointConfig
    tokenizer: PreTrainedTokenizerFast
    policy: Policy
    device: str

    @property
    def taught(self) -> bool:
        """Whether BF16 is the teacher; without it, a run is QAT."""
        return self.settings.loss == "kl"

    @property
    def weights(self) -> int:
        """Number of weights that train."""
        return _weights(self.config, self.trained)

    @property
    def device_bytes(self) -> int:
        """Memory that the language model and what trains it take on each process's device, without
        activations.
        """
        shards = (
            int(os.environ["WORLD_SIZE"]) if os.environ.get("ACCELERATE_USE_FSDP") == "true" else 1
        )
        return training_bytes(
            spec_bytes(_language_model(self.config)), self.weights, self.taught, shards
        )

    @property
    def exports(self) -> bool:
        """Whether this process is the one that goes on after the distillation."""
        return os.environ.get("RANK", "0") == "0"

    def finish(self) -> None:
        """Remove the state; call it when the result is on disk and measured."""
        end(self.directory)


@dataclass(frozen=True)
class Distilled:
    """What came of a distillation.

    Attributes:
        trained: Checkpoint names of the linears whose weights are no longer the source's.
        loss: What was learnt, and by what the best step was chosen: `KL` from BF16, or
            `cross-entropy`.
        steps: Optimizer steps made.
        best_step: The step whose weights were kept, by the held-out loss; 0 when no step was better
            than PTQ.
        tokens: Tokens trained on by this process, visual ones included.
        held_out: (step, mean loss in nats a token) of the held-out samples' answers; step 0 is the
            PTQ model.
        losses: (step, mean loss in nats a token) of the training samples.
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
        return (
            f"{gain} at step {self.best_step} of {self.steps}"
            if self.best_step
            else f"{gain}: PTQ's weights kept"
        )


def plan_distillation(
    settings: Settings,
    samples: Callable[[], Iterator[Sample]],
    config: CheckpointConfig,
    tokenizer: PreTrainedTokenizerFast,
    policy: Policy,
    output: Path,
    recipe: Mapping[str, Any],
    device: str,
) -> Plan:
    """Check a distillation against its model, its processes and what an earlier run has left.

    Args:
        settings: The recipe's.
        samples: Opens one pass over the training samples, the same at every call.
        config: The BF16 checkpoint's.
        tokenizer: The checkpoint's.
        policy: Format by linear.
        output: Directory that will be exported to.
        recipe: The parts of the recipe that decide the result, for telling whether a run may be
            taken up again.
        device: A torch device.

    Raises:
        BadInput: With every fault: no linear to train, a batch that the processes cannot share, a
            device that the trainer would not use, a launcher that would empty the weights, a state
            of another recipe or source, or a disk too small for the state.
    """
    ranks, faults = int(os.environ.get("WORLD_SIZE", "1")), []
    trained = tuple(
        name
        for name in policy.quantized
        if any(
            fnmatch.fnmatchcase(part, settings.train) for part in (name, name.rpartition(".")[2])
        )
    )
    if not trained:
        short = sorted({name.rpartition(".")[2] for name in policy.quantized})
        faults.append(
            Fault(
                "distill.train", f"{settings.train!r} matches no quantized linear", ", ".join(short)
            )
        )
    if settings.batch % ranks:
        faults.append(
            Fault(
                "distill.batch",
                f"{settings.batch} is no multiple of {ranks} processes",
                "change either",
            )
        )
    if ranks == 1 and device not in ("cpu", "cuda", "cuda:0"):
        faults.append(
            Fault(
                "device",
                f"{device!r}: training takes the first GPU",
                "set CUDA_VISIBLE_DEVICES instead",
            )
        )
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() in ("1", "true"):
        # transformers then loads empty tensors on every process but the first, and each calibrates
        # its own noise.
        remedy = "launch with --fsdp_cpu_ram_efficient_loading false"
        faults.append(
            Fault(
                "accelerate", "cpu_ram_efficient_loading leaves processes without weights", remedy
            )
        )
    files = sorted(config.directory.glob("*.safetensors"))
    source = {file.name: stamp(file) for file in files}
    identity = identity_of({"source": source, "processes": ranks, "judged by": "answers", **recipe})
    directory = output.with_name(f".{output.name}.qad")
    faults += state_faults(directory, identity)
    sharded = spec_bytes(_language_model(config)) if ranks > 1 else 0
    faults += space_faults(directory, state_bytes(_weights(config, trained), sharded))
    raise_if_any(faults)
    return Plan(settings, trained, directory, identity, samples, config, tokenizer, policy, device)


def _weights(config: CheckpointConfig, trained: Sequence[str]) -> int:
    return sum(
        math.prod(linear.shape)
        for linear in language_model_linears(config)
        if linear.name in trained
    )


def _language_model(config: CheckpointConfig) -> dict[str, TensorSpec]:
    return {
        name: spec
        for name, spec in expected_tensors(config).items()
        if name.startswith(LANGUAGE_MODEL)
    }


@memory_advice(
    lambda: "distillation ran out of memory",
    "start more processes under FSDP2, give distill.gradient_checkpointing=true or lower distill.max_length",
)
def distill(plan: Plan, model: NemotronH_Omni_Reasoning_V3, teacher: nn.Module | None) -> Distilled:
    """Train the quantized language model in place, from where an earlier run was killed if there
    was one.

    Args:
        plan: Checked.
        model: Its language model quantized and calibrated. Afterwards the trained weights are
            float32, and on the process that exports the whole model is there, on the CPU if it was
            sharded.
        teacher: `frozen_copy` of the language model from before its quantization; None when the
            plan has none.

    Raises:
        BadInput: Too many bad samples, a loss that is not finite, or one that stays above the PTQ
            model's.
        RuntimeError: A guard found a defect: a quantizer passed by, a gradient missing or astray, a
            range that moved.
    """
    student = model.language_model
    share_fused_scales(
        student, plan.policy
    )  # the export will: what is trained must be what is served
    linears = {name: student.get_submodule(module_name(name)) for name in plan.trained}
    with (
        trainable(student, linears),
        embedding_only(model),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        trainer = _trainer(plan, model, student, teacher, linears)
        share_ranges(student)
        last = next(reversed(checkpoints(plan.directory)), None)
        if last is not None:
            load_ranges(linears, last / WEIGHTS)  # a GPU may calibrate another bit this time
        before = {name: amax.clone() for name, amax in amax_of(linears).items()}
        gc.collect()
        gc.freeze()  # QADTrainer collects garbage before every batch: keep what is there out of it
        try:
            if (
                last is not None and last.name == f"checkpoint-{plan.settings.steps}"
            ):  # killed while exporting
                trainer.state = trainer.state.load_from_json(str(last / "trainer_state.json"))
                trainer._load_from_checkpoint(str(last))
            else:
                trainer.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            gc.unfreeze()
        gather(student, plan.exports)
    moved = [
        name
        for name, amax in amax_of(linears).items()
        if not torch.equal(amax.cpu(), before[name].cpu())
    ]
    if moved:
        raise RuntimeError(
            f"distillation moved the ranges of {', '.join(moved)}, which were to stay as calibrated"
        )
    best = load_weights(linears, plan.directory / BEST) if plan.exports else 0
    losses = tuple(
        (entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry
    )
    result = Distilled(
        trained=plan.trained if best else (),
        loss=trainer.loss_name,
        steps=trainer.state.global_step,
        best_step=best,
        tokens=trainer.tokens,
        held_out=tuple(trainer.history.items()),
        losses=losses,
    )
    del trainer
    gc.collect()  # it refers to itself, and holds gradients and moments that the export's memory is wanted for
    return result


def _trainer(
    plan: Plan,
    model: NemotronH_Omni_Reasoning_V3,
    student: nn.Module,
    teacher: nn.Module | None,
    linears: Mapping[str, nn.Module],
) -> DistillationTrainer:
    settings, ranks = plan.settings, int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        output_dir=str(plan.directory),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.batch // ranks,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * settings.steps),
        gradient_checkpointing=settings.gradient_checkpointing,
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would log the last finite loss in place of a NaN
        eval_strategy="steps",
        eval_steps=settings.save_every,
        eval_on_start=not checkpoints(plan.directory),
        save_strategy="steps",
        save_steps=settings.save_every,
        ignore_data_skip=True,  # the stream itself begins where the checkpoint ends
        remove_unused_columns=False,
        use_cpu=plan.device == "cpu",
        disable_tqdm=True,
        report_to=[],
        log_level="error",
    )
    arguments._n_gpu = min(
        arguments.n_gpu, 1
    )  # with several GPUs and no launcher, transformers takes DataParallel
    if plan.exports:
        begin(plan.directory, plan.identity)
    embed_sample = partial(_embed_sample, plan, model)
    stream = TrainingStream(
        plan.samples,
        embed_sample,
        settings.video_pruning_rates,
        settings.held_out,
        settings.seed,
        settings.max_skipped,
        arguments.process_index,
        ranks,
        step=arguments.gradient_accumulation_steps,
    )
    return DistillationTrainer(
        student, teacher, linears, stream, stream.held_out(), settings.patience, arguments
    )


def _embed_sample(
    plan: Plan, model: NemotronH_Omni_Reasoning_V3, sample: Sample, rate: float
) -> dict[str, Any]:
    return batch_of(model, sample, plan.config, plan.tokenizer, rate, plan.settings.max_length)
