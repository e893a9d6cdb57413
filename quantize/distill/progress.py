"""What a distillation says while it runs: loss, held-out loss, tokens a second, GPU memory."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

if TYPE_CHECKING:
    from quantize.distill.trainer import DistillationTrainer


class Progress(TrainerCallback):
    """A bar of steps where there is a terminal; a line at every evaluation everywhere, for the logs
    of long jobs.
    """

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar."""
        off = None if state.is_world_process_zero else True
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # loading, which held both models whole, is over
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="distil",
            unit="step",
            disable=off,
        )
        self._resume_clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Move the bar."""
        self._ended = time.monotonic()
        self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the step's loss."""
        logs = kwargs["logs"]
        if "loss" in logs:
            self._loss = logs["loss"]
            self._bar.set_postfix_str(f"{self._trainer.loss_name} {self._loss:.5f}", refresh=False)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say a line, and leave the evaluation out of the clock."""
        said = f"step {state.global_step} of {state.max_steps}: held-out {self._trainer.loss_name} "
        said += f"{self._trainer.history[state.global_step]:.5f} nats"
        if tokens := self._trainer.tokens - self._tokens:
            rate = tokens * args.world_size / (self._ended - self._started)
            said += f", step's {self._loss:.5f}, {rate:,.0f} tokens/s"
        if args.device.type == "cuda":
            said += f", GPU memory at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        if state.is_world_process_zero:
            self._bar.write(said, file=sys.stderr)
        self._resume_clock()

    def on_save(self, *_: Any, **__: Any) -> None:
        """Leave the checkpoint out of the clock."""
        self._resume_clock()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the bar."""
        self._bar.close()

    def _resume_clock(self) -> None:
        self._started, self._tokens = time.monotonic(), self._trainer.tokens
