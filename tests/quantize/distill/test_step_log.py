"""What a distillation says between two evaluations."""

import logging
from types import SimpleNamespace

import pytest

from quantize.distill import step_log
from quantize.distill.step_log import QUIET_SECONDS, StepLog


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the log reads, which a test moves."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(step_log, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def run_steps(clock, seconds, processes=1, is_first=True):
    """Let steps of 4,096 tokens a process end after so many seconds each."""
    trainer = SimpleNamespace(tokens=0, loss_name="KL")
    log = StepLog(trainer)
    device = SimpleNamespace(type="cpu")
    args = SimpleNamespace(device=device, world_size=processes)
    state = SimpleNamespace(global_step=0, max_steps=len(seconds), is_world_process_zero=is_first)
    log.on_train_begin(args, state, None)
    for step, taken in enumerate(seconds, 1):
        log.on_step_begin(args, state, None)
        clock.seconds += taken
        trainer.tokens += 4096
        state.global_step = step
        log.on_step_end(args, state, None)
        log.on_log(args, state, None, logs={"loss": 0.25})
        log.on_log(args, state, None, logs={"eval_loss": 0.5})
    log.on_train_end(args, state, None)


def test_long_steps_have_a_line_each(clock, caplog):
    caplog.set_level(logging.INFO, logger="hybridquant")
    run_steps(clock, [QUIET_SECONDS, 2 * QUIET_SECONDS], processes=2)
    assert caplog.messages == [
        "step 1 of 2: KL 0.25000 nats, 60.0 s, 137 tokens/s",
        "step 2 of 2: KL 0.25000 nats, 120.0 s, 68 tokens/s",
    ]


def test_of_short_steps_one_a_minute_has_a_line(clock, caplog):
    caplog.set_level(logging.INFO, logger="hybridquant")
    run_steps(clock, [QUIET_SECONDS / 4] * 9)
    assert [message.split(":")[0] for message in caplog.messages] == ["step 4 of 9", "step 8 of 9"]


def test_verbose_shows_every_step(clock, caplog):
    caplog.set_level(logging.DEBUG, logger="hybridquant")
    run_steps(clock, [1.0] * 3)
    assert len(caplog.messages) == 3


def test_other_processes_say_nothing(clock, caplog):
    caplog.set_level(logging.DEBUG, logger="hybridquant")
    run_steps(clock, [QUIET_SECONDS], processes=2, is_first=False)
    assert caplog.messages == []
