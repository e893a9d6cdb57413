"""ModelOpt's QADTrainer for this model: embeddings in, a loss that fits at 16,384 tokens, guards,
checkpoints that a kill leaves whole.

Everything else is ModelOpt's and transformers' own: forward KL divergence, optimizer, schedule,
accumulation, FSDP2, resuming. Without a teacher the loss is cross-entropy, so that QAT can be
compared with QAD under the same guards.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from modelopt.torch.quantization.plugins.transformers_trainer import QADTrainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    DefaultFlowCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    modeling_utils,
)

from checkpoint.faults import BadInput, Fault
from quantize.distill.checkpoints import (
    BEST,
    PARTIAL,
    WEIGHTS,
    Progress,
    disk_errors,
    finish_checkpoint,
    last_checkpoint,
    read_progress,
)
from quantize.distill.dataset import TrainingDataset
from quantize.distill.guards import GradientCheck, watched_quantizers
from quantize.distill.loss import hidden_states, loss_sum, replaced_head
from quantize.distill.packing import Packed
from quantize.distill.plan import DistillationPlan
from quantize.distill.rows import IGNORE, Row
from quantize.distill.step_log import StepLog
from quantize.distill.student import own_embeddings
from quantize.distill.weights import Trained, load_weights, save_weights
from quantize.modelopt_output import printed_to_log

_ADVICE = (
    "lower distill.learning_rate first, tenfold; "
    "2e-6 is right for the 12B, 2e-5 ends below PTQ there"
)
_ADVICE_AT_START = (
    "no weight has changed yet: look at the samples, and at what PTQ alone gives with distill=null"
)


_MODEL_INPUTS = ("inputs_embeds", "text_ids", "labels", "weights")
"""Tensors of a row."""


class DistillationArguments(TrainingArguments):
    """TrainingArguments of one GPU per process."""

    @property
    def n_gpu(self) -> int:
        """At most 1: with several GPUs and no launcher, transformers would take DataParallel."""
        return min(super().n_gpu, 1)


def training_arguments(plan: DistillationPlan) -> DistillationArguments:
    """Return a plan's schedule as transformers' arguments.

    Trap of accelerate: under FSDP2 the gradients of accumulated rows stay whole in each process
    until the last row of a step, unless `sync_each_batch` is set. All weights of the 12B have
    gradients of 49 GB, and ran out of memory on two GPUs of 150 GB
    (benchmarks/results/training_12b_h200.json).
    """
    settings = plan.settings
    # The first step of a warm-up has the rate 0: of a single step, nothing would be left.
    warmup_steps = min(round(settings.warmup * settings.steps), settings.steps - 1)
    return DistillationArguments(
        output_dir=str(plan.directory / PARTIAL),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.batch // plan.processes.count,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_steps,
        gradient_checkpointing=settings.gradient_checkpointing,
        ddp_find_unused_parameters=False,  # what trains and has no gradient is GradientCheck's
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would log the last finite loss in place of a NaN
        eval_strategy="steps",
        eval_steps=settings.save_every,
        eval_on_start=last_checkpoint(plan.directory) is None,
        save_strategy="steps",
        save_steps=settings.save_every,
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": plan.is_sharded}},
        ignore_data_skip=True,  # the dataset itself begins where the checkpoint ends
        remove_unused_columns=False,
        use_cpu=plan.device == "cpu",
        disable_tqdm=True,
        report_to=[],
        log_level="error",
    )


class DistillationTrainer(QADTrainer):
    """QADTrainer with this model's inputs and loss.

    Attributes:
        history: Held-out loss in nats per token of the answers by step; step 0 is the PTQ model's.
        loss_name: `KL`, or `cross-entropy` without a teacher.
        tokens: Tokens that this process has trained on, visual ones included.
    """

    control: Any

    def __init__(
        self,
        plan: DistillationPlan,
        student: nn.Module,
        teacher: nn.Module | None,
        trained: Trained,
        dataset: TrainingDataset,
        held_out: Sequence[Row],
    ) -> None:
        """Set up; nothing is run yet.

        Args:
            plan: Checked.
            student: The quantized language model; its only trainable weights are `trained`.
            teacher: The BF16 language model; without it, the samples' own tokens are learnt by
                cross-entropy.
            trained: What trains.
            dataset: Training rows.
            held_out: Held-out rows, the same in every process.
        """
        callbacks: list[TrainerCallback] = [
            GradientCheck(trained),
            _CheckpointFinisher(self),
            StepLog(self),
        ]
        with printed_to_log(), _restored(PreTrainedModel, modeling_utils):
            super().__init__(
                model=student,
                args=training_arguments(plan),
                train_dataset=dataset,
                eval_dataset=list(held_out),
                distill_args={"teacher_model": teacher or nn.Identity(), "temperature": 1.0},
                callbacks=callbacks,
            )
        self._keep_callbacks(callbacks)
        self.history: dict[int, float] = {}
        self.loss_name = "KL" if teacher else "cross-entropy"
        self.tokens = 0
        self._plan = plan
        self._trained = trained
        self._trains_embeddings = plan.trains_embeddings
        self._dataset = dataset
        self._teacher: nn.Module | None = teacher
        # Whole, also where FSDP will shard the teacher.
        head: Any = None if teacher is None else teacher.lm_head
        self._teacher_head: torch.Tensor | None = None if head is None else head.weight.detach()
        self._teacher_is_prepared = False
        self._quantizers_are_checked = False
        self._next_position = dataset.start

    def _keep_callbacks(self, ours: Sequence[TrainerCallback]) -> None:
        """Remove what prints to stdout: transformers' log and ModelOpt's report of GPU memory."""
        for callback in list(self.callback_handler.callbacks):
            if callback not in ours and not isinstance(callback, DefaultFlowCallback):
                self.remove_callback(callback)

    # Data: a row is embedded when it is fetched, or before, and stays on the CPU until its turn.

    def get_train_dataloader(self) -> DataLoader:
        """Return the dataset as it is.

        It shards itself; accelerate would broadcast the rows of one process.
        """
        return DataLoader(self._dataset, batch_size=None)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the matrices: norms, biases, and Mamba's A, D and time steps do not decay."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: transformers estimates it from `input_ids`, and there are none."""
        return 0

    # Loss.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Row,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss summed over this row, divided by the positions of the whole step.

        KDTrainer averages each row by itself, and transformers, seeing labels, does not divide by
        the accumulation: gradients would be too large by the number of accumulated rows, and
        short samples would weigh most.

        Args:
            model: The student, wrapped as transformers trains it.
            inputs: A row, its tensors on this process's device.
            return_outputs: Whether to return the model's outputs as well.
            num_items_in_batch: Positions that count in the step, over all processes.
        """
        embeds = inputs["inputs_embeds"]
        packed = None
        if len(inputs["lengths"]) > 1:
            packed = Packed(inputs["lengths"], embeds.device)
        theirs = None
        if self._teacher is not None:
            self._prepare_teacher(self._teacher)
            with torch.no_grad():
                theirs = hidden_states(self._teacher, embeds, packed)
        student: Any = self.accelerator.unwrap_model(self.model)

        def loss_of(ours: torch.Tensor) -> torch.Tensor:
            head = student.lm_head.weight
            labels = inputs["labels"]
            return loss_sum(ours, theirs, labels, head, self._teacher_head, inputs["weights"])

        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced_head(student, loss_of))
            if self._trains_embeddings:
                stack.enter_context(own_embeddings(student, inputs["text_ids"]))
            outputs = model(inputs_embeds=embeds, use_cache=False, packed=packed)
        # FSDP and DDP average gradients over processes, which are to be summed.
        loss = outputs.logits * self.accelerator.num_processes
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _prepare_teacher(self, teacher: nn.Module) -> None:
        """Shard the teacher like the student, or bring it to this process's device, once."""
        if self._teacher_is_prepared:
            return
        self._teacher_is_prepared = True
        if self._teacher_head is not None:
            self._teacher_head = self._teacher_head.to(self.args.device)
        if self.is_fsdp_enabled:
            # accelerate shards a model under FSDP2 only together with an optimizer.
            optimizer = torch.optim.SGD([next(teacher.parameters())], lr=0.0)
            self._teacher, _ = self.accelerator.prepare(teacher, optimizer)
        else:
            # Not prepared by accelerate: on CPU processes it would wrap the teacher in DDP, which
            # refuses a model without gradients.
            self._teacher = teacher.to(self.args.device)

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Train as transformers does; QATTrainer only adds a message that does not hold here.

        Raises:
            OSError: A checkpoint cannot be written.
        """
        with disk_errors(self._plan.directory, self._plan.state_bytes):
            try:
                return Trainer.train(self, resume_from_checkpoint=resume_from_checkpoint, **options)
            finally:
                self._dataset.close()

    def training_step(
        self, model: nn.Module, inputs: Row, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run one forward and backward; the first one must call every enabled quantizer.

        Raises:
            BadInput: The loss is not finite.
            RuntimeError: A quantizer was not called.
        """
        given = {name: inputs[name] for name in _MODEL_INPUTS} | {"lengths": inputs["lengths"]}
        with contextlib.ExitStack() as stack:
            if not self._quantizers_are_checked:
                self._quantizers_are_checked = True
                stack.enter_context(watched_quantizers(model))
            loss = super().training_step(model, given, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            what = f"the loss is {float(loss)} after {self.state.global_step} steps"
            raise BadInput(Fault("distill", what, self._advice()))
        self._next_position = inputs["next_position"]
        self.tokens += inputs["labels"].numel()
        if self.state.global_step + 1 < self.state.max_steps:
            self._dataset.embed_ahead()
        return loss

    # Held-out loss.

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Compute the mean loss of the held-out rows and keep the best weights.

        Raises:
            BadInput: It is not finite, or has been above the PTQ start `patience` times in a row.
        """
        loss = self._held_out_loss()
        step = self.state.global_step
        is_best = all(loss < earlier for at, earlier in self.history.items() if at != step)
        self.history[step] = loss
        metrics = {"eval_loss": loss}
        self.log(metrics)
        # Trap: without this the request stands, and transformers evaluates the last step twice.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
        self._check_history()
        if is_best:
            self._save_weights(self._plan.directory / BEST)
        return metrics

    def _held_out_loss(self) -> float:
        """Mean loss per token of the answers in nats, over all processes."""
        model = self.model_wrapped.eval()
        processes = self._plan.processes
        rows: Any = self.eval_dataset
        sums = torch.zeros(2, device=self.args.device)
        # Sharded models run in step: every process takes as many rows, and those beyond the
        # last count nothing.
        rounds = math.ceil(len(rows) / processes.count)
        for number in range(rounds):
            index = number * processes.count + processes.index
            row = rows[index % len(rows)]
            inputs = {name: row[name].to(sums.device) for name in _MODEL_INPUTS}
            inputs["lengths"] = row["lengths"]
            loss = self.compute_loss(model, inputs, num_items_in_batch=processes.count)
            if index < len(rows):
                sums[0] += loss
                sums[1] += (inputs["labels"][:, 1:] != IGNORE).sum()
        total, count = self.accelerator.reduce(sums).tolist()
        return total / count

    def _check_history(self) -> None:
        start, *later = self.history.values()
        recent = later[-self._plan.settings.patience :]
        newest = later[-1] if later else start
        if not math.isfinite(newest):
            what = f"held-out {self.loss_name} is {newest} after {self.state.global_step} steps"
            raise BadInput(Fault("distill", what, self._advice()))
        if len(recent) == self._plan.settings.patience and min(recent) > start:
            what = f"held-out {self.loss_name} has been above PTQ's {start:.5f} nats"
            what += f" {len(recent)} times in a row, now {newest:.5f}"
            raise BadInput(Fault("distill", what, _ADVICE))

    def _advice(self) -> str:
        """What to do about a loss that is not finite."""
        return _ADVICE if self.state.global_step else _ADVICE_AT_START

    # Checkpoints.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights and all ranges; everything else is in the source."""
        assert output_dir is not None
        self._save_weights(Path(output_dir) / WEIGHTS)

    def _save_weights(self, path: Path) -> None:
        save_weights(self._trained, path, self.state.global_step, self._plan.processes)

    def finish_checkpoint(self) -> None:
        """Complete the checkpoint that transformers has written and give it its name."""
        progress = Progress(self._next_position, self.tokens, self.history)
        finish_checkpoint(self._plan, self.state.global_step, progress)

    def restore(self, checkpoint: Path) -> None:
        """Load the weights and the progress of a checkpoint."""
        load_weights(self._trained, checkpoint / WEIGHTS)
        progress = read_progress(checkpoint, self._plan.processes.index)
        self.history = dict(progress.history)
        self.tokens = progress.tokens
        self._next_position = progress.position
        self._dataset.start = progress.position

    def restore_finished(self, checkpoint: Path) -> None:
        """Load the checkpoint of the last step, after which nothing is trained."""
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.restore(checkpoint)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        # transformers' private hook, since there is no public one: its own method raises "Can't
        # find a valid checkpoint" at a directory without its weight file, and loads that file with
        # strict=False, under names that save_pretrained has changed. The tests of resuming fail
        # without this.
        self.restore(Path(resume_from_checkpoint))


class _CheckpointFinisher(TrainerCallback):
    """Has the trainer finish each checkpoint that transformers has written."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer

    def on_save(self, *_: Any, **__: Any) -> None:
        self._trainer.finish_checkpoint()


@contextlib.contextmanager
def _restored(*owners: type | ModuleType) -> Iterator[None]:
    """Undo what the body replaces in classes or modules.

    Trap of ModelOpt 0.47: its trainer replaces `PreTrainedModel.from_pretrained` for the whole
    process (`enable_huggingface_checkpointing`). `checkpoint.native`, which gives it no path, then
    fails with "stat: path should be string, bytes, os.PathLike or integer, not NoneType". Our
    checkpoints do not need the replacement.
    """
    before = [dict(vars(owner)) for owner in owners]
    try:
        yield
    finally:
        for owner, attributes in zip(owners, before, strict=True):
            for name, value in attributes.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)
