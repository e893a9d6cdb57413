"""Logs the steps of a distillation: loss, held-out loss, tokens per second, GPU memory."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from checkpoint.log import get_logger

if TYPE_CHECKING:
    from quantize.distill.trainer import DistillationTrainer

logger = get_logger(__name__)

QUIET_SECONDS = 60.0
"""Longest time without a line while steps end."""


class StepLog(TrainerCallback):
    """Shows a bar of steps on a terminal, and logs a line at every evaluation and, between them,
    at least once a minute. With `--verbose` every step has a line.

    `benchmarks.training` reads these lines.
    """

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer
        self._shown = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar."""
        if args.device.type == "cuda":
            # Loading, which held both models whole, does not count.
            torch.cuda.reset_peak_memory_stats()
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="distill",
            unit="step",
            disable=not (is_terminal and state.is_world_process_zero),
        )
        self._restart_clock()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the step's clock."""
        self._step_started = time.monotonic()
        self._step_tokens = self._trainer.tokens

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Move the bar."""
        self._ended = time.monotonic()
        self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the step's loss, seconds and tokens per second."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        self._loss = logs["loss"]
        self._bar.set_postfix_str(f"{self._trainer.loss_name} {self._loss:.5f}", refresh=False)
        seconds = self._ended - self._step_started
        tokens = (self._trainer.tokens - self._step_tokens) * args.world_size
        line = f"step {state.global_step} of {state.max_steps}: "
        line += f"{self._trainer.loss_name} {self._loss:.5f} nats, "
        line += f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s"
        is_due = self._ended - self._shown >= QUIET_SECONDS
        self._show(line, state, logging.INFO if is_due else logging.DEBUG)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log a line, and leave the evaluation out of the clock."""
        held_out = self._trainer.history[state.global_step]
        line = f"step {state.global_step} of {state.max_steps}: "
        line += f"held-out {self._trainer.loss_name} {held_out:.5f} nats"
        tokens = self._trainer.tokens - self._tokens
        if tokens:
            rate = tokens * args.world_size / (self._ended - self._started)
            line += f", step's {self._loss:.5f}, {rate:,.0f} tokens/s"
        if args.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 1e9
            line += f", GPU memory at most {memory:.1f} GB"
        self._show(line, state, logging.INFO)
        self._restart_clock()

    def on_save(self, *_: Any, **__: Any) -> None:
        """Leave the checkpoint out of the clock."""
        self._restart_clock()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the bar."""
        self._bar.close()

    def _show(self, line: str, state: Any, level: int) -> None:
        """Log a line of the first process."""
        if state.is_world_process_zero and logger.isEnabledFor(level):
            self._shown = time.monotonic()
            with tqdm.external_write_mode(file=sys.stderr):  # clears the bar for the line
                logger.log(level, line)

    def _restart_clock(self) -> None:
        self._started = time.monotonic()
        self._tokens = self._trainer.tokens
