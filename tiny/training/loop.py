"""Runs a training: steps, log, saved state, pauses, at the end the checkpoint and its accuracy."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from checkpoint.atomic import write_json
from checkpoint.faults import BadInput, Fault
from checkpoint.log import get_logger
from tiny.training.data import SECOND_SHARES, SHARES, Batch, Batches
from tiny.training.evaluation import drawn_items, evaluated
from tiny.training.graphed import Pool
from tiny.training.items import PromptBuilder
from tiny.training.log import Seen
from tiny.training.model import save_released
from tiny.training.settings import Settings
from tiny.training.trainer import Trainer

logger = get_logger(__name__)

_LOG_EVERY = 500
"""Steps between log lines."""
_SAVE_EVERY_SECONDS = 120


def train(settings: Settings) -> dict[str, Any] | None:
    """Train until the run is done or pauses; at its end write the checkpoint and evaluate it.

    Returns:
        The evaluation, or None after a pause.

    Raises:
        BadInput: The output has a checkpoint already, or belongs to a run with other settings.
        FloatingPointError: The loss is not finite.
    """
    deadline = time.monotonic() + 60 * settings.pause_after
    released = settings.out / "checkpoint"
    if released.exists():
        raise BadInput(Fault(str(released), "exists already", "remove it, or give another output"))
    settings.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings)
    trainer.resume()
    _run_steps(trainer, deadline)
    if trainer.done < 1:
        save_released(trainer.model, trainer.config, settings.out / "so-far")
        logger.info("paused at step %d; run the same command to resume", trainer.step)
        return None
    save_released(trainer.model, trainer.config, released)
    items = drawn_items(trainer.directory, settings.workers)
    accuracy = evaluated(trainer.losses, items, trainer.config.image_token_id)
    evaluation = {"step": trainer.step, "seconds": round(trainer.seconds), "accuracy": accuracy}
    write_json(settings.out / "evaluation.json", evaluation)
    return evaluation


def _run_steps(trainer: Trainer, deadline: float) -> None:
    """Train until the run is done, time is up or the process is asked to end; then save the state.

    Args:
        trainer: The run.
        deadline: Time, as `time.monotonic` returns it, to pause at.
    """
    settings = trainer.settings
    # The processes of the loader read how much of the run is done.
    done = multiprocessing.Value("d", trainer.done)
    pool = Pool(iter(_loader(trainer, done)), settings.device)
    batches = iter(pool)
    seen = Seen()
    saved = time.monotonic()
    # The loader's processes are started before the signal handlers are set, or they would inherit
    # the handlers and not end when they are terminated.
    with (
        _stop_signals() as stopped,
        (settings.out / "log.jsonl").open("a", encoding="utf-8") as log,
    ):
        while trainer.done < 1 and time.monotonic() < deadline and not stopped.is_set():
            batch, new = next(batches)
            trainer.train_step(batch, new, seen)
            done.value = trainer.done
            if trainer.step % _LOG_EVERY == 0 or trainer.done >= 1:
                trainer.steps.wait()
                line = _log_line(trainer, seen)
                log.write(json.dumps(line) + "\n")
                log.flush()
                logger.info("%s", json.dumps(line))
                if not math.isfinite(line["loss"]):
                    raise FloatingPointError(f"loss is not finite at step {trainer.step}")
                seen = Seen()
            if time.monotonic() - saved > _SAVE_EVERY_SECONDS:
                trainer.save()
                saved = time.monotonic()
        trainer.save()
        pool.close()


def _log_line(trainer: Trainer, seen: Seen) -> dict[str, Any]:
    progress = {
        "step": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "done": round(trainer.done, 3),
    }
    return progress | seen.line()


def _loader(trainer: Trainer, done: Any) -> DataLoader[Batch]:
    settings = trainer.settings
    source = Batches(
        builder=PromptBuilder(trainer.config, trainer.tokenizer),
        seed=settings.seed,
        start=trainer.step,
        tokens=settings.tokens,
        done=done,
        shares=SECOND_SHARES if settings.start else SHARES,
    )
    return DataLoader(
        source,
        batch_size=None,
        num_workers=settings.workers,
        pin_memory=settings.device == "cuda",
        prefetch_factor=3 if settings.workers else None,
        worker_init_fn=_leave_process_group,
    )


def _leave_process_group(_: int) -> None:
    """Give a worker its own process group.

    A signal to the trainer's group, such as Ctrl-C, then leaves it running until the trainer has
    saved its state.
    """
    os.setpgrp()


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set, in place of ending the process.

    Only the main thread can set handlers; elsewhere signals keep their effect.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
