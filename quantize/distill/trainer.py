"""ModelOpt's QADTrainer for this model: embeddings in, a loss that fits at 16,384 tokens, guards,
safe checkpoints.

Everything else is ModelOpt's and transformers' own: forward KL, optimizer, schedule, accumulation,
FSDP2, resuming. Without a teacher the loss is cross-entropy, so that QAT can be compared with QAD
under the same guards.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import modelopt.torch.opt.plugins.transformers as modelopt_transformers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.plugins.transformers_trainer import QADTrainer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from checkpoint.faults import BadInput, Fault
from quantize.distill.batches import IGNORE, Batch, TrainingStream
from quantize.distill.progress import Progress
from quantize.distill.state import (
    BEST,
    WEIGHTS,
    checkpoints,
    flush,
    load_weights,
    save_weights,
    whole,
)

POSITIONS = 512
"""Positions whose logits exist at once: 2 × 0.27 GB at the 12B's vocabulary, where ModelOpt's own
loss would hold several tensors of 8.7 GB at 16,384 tokens."""

_PROGRESS = "progress.json"
_ADVICE = "lower distill.learning_rate first, tenfold; 2e-6 is right for the 12B, 2e-5 ends below PTQ there"


class DistillationTrainer(QADTrainer):
    """QADTrainer with this model's inputs and loss.

    Attributes:
        history: Held-out loss in nats a token of the answers by step; step 0 is the PTQ model's.
        loss_name: `KL`, or `cross-entropy` without a teacher.
    """

    control: Any
    _teacher_prepared: bool

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        trained: Mapping[str, nn.Module],
        stream: TrainingStream,
        held_out: Sequence[Batch],
        patience: int,
        arguments: TrainingArguments,
    ) -> None:
        """Set up; nothing is run yet.

        Args:
            student: The quantized language model, `trained` its only trainable weights.
            teacher: The BF16 language model; without it, the samples' own tokens are learnt by
                cross-entropy.
            trained: Quantized linears by checkpoint name.
            stream: Training batches.
            held_out: Held-out batches, the same on every process.
            patience: Evaluations in a row above the PTQ start before the run stops.
            arguments: The schedule; `output_dir` is where checkpoints go.
        """
        # ModelOpt's trainer would patch from_pretrained for the whole process; checkpoint.native,
        # which gives it no path, then fails with "stat: path should be string". Our checkpoints do
        # not need the patch.
        with mock.patch.object(modelopt_transformers, "enable_huggingface_checkpointing"):
            super().__init__(
                model=student,
                args=arguments,
                train_dataset=stream,
                eval_dataset=list(held_out),
                distill_args={"teacher_model": teacher or nn.Identity(), "temperature": 1.0},
                callbacks=[_Gradients(trained), Progress(self)],
            )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        # KDTrainer's path for Liger hands over final hidden states, which the loss below turns into
        # logits piece by piece. Liger's own kernel is Triton only.
        self.use_liger_kernel = True
        self.history: dict[int, float] = {}
        self.loss_name = "KL" if teacher else "cross-entropy"
        self.tokens = 0
        self._last_teacher_outputs: Any = None
        self._trained, self._stream, self._patience = dict(trained), stream, patience
        self._called: set[str] | None = None
        self._saving: str | None = None
        self._next = stream.start

    # Data: a batch is embedded when it is fetched, on the CPU until its turn.

    def get_train_dataloader(self) -> DataLoader:
        """The stream as it is: it shards itself, and accelerate would broadcast batches from one
        process.
        """
        return DataLoader(self._stream, batch_size=None)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: transformers counts `input_ids`, and there are none."""
        return 0

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(
            {key: inputs[key] for key in ("inputs_embeds", "labels")}
        )
        return prepared | {"use_cache": False}

    def _ensure_teacher_prepared(self) -> None:
        # Only sharding needs accelerate: on CPU processes it would wrap the teacher in DDP, which
        # refuses a model without gradients.
        if self.loss_name != "KL":
            return
        if self.is_fsdp_enabled:
            super()._ensure_teacher_prepared()
        elif not self._teacher_prepared:
            self._teacher_prepared = True
            self._teacher_model.to(self.args.device)

    # Loss.

    def _compute_kd_loss(
        self, outputs: Any, labels: torch.Tensor, inputs: Any, **kwargs: Any
    ) -> torch.Tensor:
        if self.loss_name == "KL":
            return super()._compute_kd_loss(outputs, labels, inputs, **kwargs)
        return self._liger_kd_loss(outputs, labels, **kwargs)

    def _liger_kd_loss(
        self,
        outputs: Any,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int = 1,
        **_: Any,
    ) -> torch.Tensor:
        """Sum of the loss over this batch's positions, divided by the positions of the whole step
        on all processes.

        KDTrainer averages each batch by itself, and transformers, seeing labels, does not divide by
        the accumulation: gradients would be as many times too large as batches are accumulated, and
        short samples would weigh most.
        """
        teacher_outputs: Any = self._last_teacher_outputs
        self._last_teacher_outputs = None
        student, teacher = outputs.logits, teacher_outputs.logits if teacher_outputs else None
        total = self._sharded_liger_compute(lambda: self._loss_sum(student, teacher, labels))
        return (
            total * self.accelerator.num_processes / num_items_in_batch
        )  # FSDP and DDP average over processes

    def _loss_sum(
        self, student: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        """The loss, in nats, summed over the positions whose next token counts: ModelOpt's forward
        KL from the teacher, or the cross-entropy of the tokens themselves."""
        # The heads are one: it is not quantized and not trained.
        head = self._get_lm_head(self.accelerator.unwrap_model(self.model)).weight
        counted = labels[:, 1:] != IGNORE
        ours = student[:, :-1][counted].to(head.dtype)
        target = (
            labels[:, 1:][counted] if teacher is None else teacher[:, :-1][counted].to(head.dtype)
        )

        def piece(ours: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            logits = F.linear(ours, head).float()
            if teacher is None:
                return F.cross_entropy(logits, target, reduction="sum")
            return self._kd_criterion(logits, F.linear(target, head).float()).sum()

        pieces = zip(ours.split(POSITIONS), target.split(POSITIONS), strict=True)
        return torch.stack([checkpoint(piece, *pair, use_reentrant=False) for pair in pieces]).sum()

    # Guards.

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One forward and backward; the first one proves that every enabled quantizer is called.

        Raises:
            BadInput: The loss is not finite.
            RuntimeError: A quantizer was passed by.
        """
        watch = (
            contextlib.nullcontext() if self._called is not None else self._watch_quantizers(model)
        )
        with watch:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise BadInput(
                Fault(
                    "distill",
                    f"the loss is {float(loss)} after {self.state.global_step} steps",
                    _ADVICE,
                )
            )
        self._next = int(inputs["next"])
        self.tokens += inputs["labels"].numel()
        return loss

    @contextlib.contextmanager
    def _watch_quantizers(self, model: nn.Module) -> Iterator[None]:
        self._called = called = set[str]()
        enabled = {
            n: m
            for n, m in model.named_modules()
            if isinstance(m, TensorQuantizer) and m.is_enabled
        }
        hooks = [
            m.register_forward_hook(lambda *_, name=n: called.add(name)) for n, m in enabled.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if missed := sorted(set(enabled) - called):
            # Seen with mamba_ssm: the fused Mamba kernel takes out_proj.weight as it is, and the
            # model trains as if out_proj were not quantized.
            raise RuntimeError(
                f"a training step did not call {len(missed)} enabled quantizers: {', '.join(missed)}"
            )

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss of the held-out batches, over the answers' tokens where there are answers;
        keeps the best weights.

        Raises:
            BadInput: It is not finite, or has been above the PTQ start `patience` times in a row.
        """
        self._ensure_teacher_prepared()
        model = self.model_wrapped.eval()
        rank, ranks = self.args.process_index, self.args.world_size
        sums = torch.zeros(2, device=self.args.device)
        # Sharded models run in step: every process takes as many batches, the surplus ones count
        # nothing.
        for index in range(rank, math.ceil(len(self.eval_dataset) / ranks) * ranks, ranks):
            inputs = self._prepare_inputs(self.eval_dataset[index % len(self.eval_dataset)])
            labels = inputs.pop("labels")
            with self._liger_identity_lm_head():
                outputs = model(**inputs)
            loss = self._compute_kd_loss(outputs, labels, inputs, num_items_in_batch=ranks)
            if index < len(self.eval_dataset):
                sums += torch.stack([loss, (labels[:, 1:] != IGNORE).sum().to(loss)])
        total, count = self.accelerator.reduce(sums).tolist()
        self.history[self.state.global_step] = total / count
        self.log({"eval_loss": total / count})
        # Without this the request stands, and transformers evaluates the last step twice.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
        self._judge()
        if all(
            loss > total / count
            for step, loss in self.history.items()
            if step != self.state.global_step
        ):
            self._write_weights(Path(self.args.output_dir) / BEST)
        return {"eval_loss": total / count}

    def _judge(self) -> None:
        start, *later = self.history.values()
        recent = later[-self._patience :]
        if not math.isfinite([start, *later][-1]):
            raise BadInput(
                Fault(
                    "distill",
                    f"held-out {self.loss_name} is {later[-1] if later else start}",
                    _ADVICE,
                )
            )
        if len(recent) == self._patience and min(recent) > start:
            above = (
                f"above PTQ's {start:.5f} nats {len(recent)} times in a row, now {recent[-1]:.5f}"
            )
            raise BadInput(Fault("distill", f"held-out {self.loss_name} has been {above}", _ADVICE))

    # Checkpoints: written beside their name and renamed, so that a kill leaves whole ones only.

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        directory = Path(self.args.output_dir)
        partial = directory / ".partial"
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self._barrier()
        self._saving = str(partial)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = None
        positions: list[Any] = [None] * self.args.world_size
        if self.args.world_size > 1:
            dist.all_gather_object(positions, (self._next, self.tokens))
        else:
            positions = [(self._next, self.tokens)]
        self._barrier()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            progress = {"positions": positions, "history": list(self.history.items())}
            (partial / name / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
            flush(partial)
            shutil.rmtree(directory / name, ignore_errors=True)
            os.rename(partial / name, directory / name)
            for older in checkpoints(directory)[:-1]:
                shutil.rmtree(older)
        self._barrier()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights and all ranges; the rest is in the source."""
        assert output_dir is not None
        self._write_weights(Path(output_dir) / WEIGHTS)

    def _write_weights(self, path: Path) -> None:
        save_weights(self._trained, path, self.state.global_step, self.args.should_save)
        self._barrier()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        # transformers would load its own file with strict=False, under names that save_pretrained
        # has changed.
        directory = Path(resume_from_checkpoint)
        load_weights(self._trained, directory / WEIGHTS)
        progress = json.loads((directory / _PROGRESS).read_text(encoding="utf-8"))
        self._next, self.tokens = progress["positions"][self.args.process_index]
        self._stream.start = self._next
        self.history = {int(step): loss for step, loss in progress["history"]}

    def _barrier(self) -> None:
        self.accelerator.wait_for_everyone()


class _Gradients(TrainerCallback):
    """Proves at the first optimizer step that gradients reach every weight that trains, and no
    other.
    """

    def __init__(self, trained: Mapping[str, nn.Module]) -> None:
        self._names = {id(module): name for name, module in trained.items()}
        self._done = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._done:
            return
        self._done, without, strangers = True, dict(self._names), []
        for name, module in kwargs["model"].named_modules():
            for key, parameter in module._parameters.items():
                if (
                    parameter is None
                    or parameter.grad is None
                    or not bool(whole(parameter.grad.norm()))
                ):
                    continue
                if id(module) in self._names and key == "weight":
                    del without[id(module)]
                else:
                    strangers.append(f"{name}.{key}")
        if without or strangers:
            raise RuntimeError(
                f"no gradient at {sorted(without.values())}, and one too many at {strangers}"
            )
