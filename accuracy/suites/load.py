"""How many requests a server is sent at a time: grown until it answers no faster, or has a queue.

A server is busy when a request waits in it, or when more requests at a time bring no more answers
in a second. Both are measured while a task is asked; the result has the figures.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai import OpenAI

FIRST = 8
"""Requests at a time to begin with."""

MOST = 256
"""Requests at a time at most: as many sequences as vLLM's server computes at once by default."""

_GROWTH = 2
_FASTER = 1.05
"""How much faster a step has to be than the fastest before it, to count as faster."""
_STEPS_WITHOUT_GAIN = 2
"""Steps without a gain after which no further one is tried: one alone may be chance."""
_LEAST_ANSWERS = 16
_READ_SECONDS = 1.0
"""Seconds between two readings of the server's queue."""

_COUNTER = re.compile(r"^vllm:num_requests_(running|waiting)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Queue:
    """What a server reports about its requests.

    Attributes:
        running: Requests that it computes.
        waiting: Requests that wait until it can compute them.
    """

    running: int
    waiting: int


@dataclass(frozen=True)
class Step:
    """What was measured while a number of requests was under way.

    Attributes:
        at_once: Requests at a time.
        answers: Answers that came.
        seconds: How long they took.
        running: Mean requests that the server computed; None where it does not report it.
        waiting: Mean requests that waited in the server; None where it does not report it.
    """

    at_once: int
    answers: int
    seconds: float
    running: float | None
    waiting: float | None

    @property
    def rate(self) -> float:
        """Answers per second."""
        return self.answers / self.seconds if self.seconds else 0.0


def read_queue(client: OpenAI) -> Queue | None:
    """Return the queue of a vLLM server; None where no such server answers.

    It is read from vLLM's `/metrics`, summed over its engines.
    """
    from openai import OpenAIError

    root = str(client.base_url).rstrip("/").removesuffix("/v1")
    try:
        text = client.with_options(timeout=5).get(f"{root}/metrics", cast_to=str)
    except (OpenAIError, ValueError):
        return None
    counts = {"running": 0.0, "waiting": 0.0}
    found = _COUNTER.findall(str(text))
    for name, value in found:
        counts[name] += float(value)
    return Queue(int(counts["running"]), int(counts["waiting"])) if found else None


class Load:
    """Keeps as many requests under way as a server needs to be busy.

    The number is doubled as long as that brings more answers per second. Each number is held for
    three times as many answers: the first third is not counted, because requests of the smaller
    number are still among them.

    Attributes:
        at_once: Requests that may be under way now.
        most: Requests that may ever be.
        steps: What was measured, in order.
    """

    def __init__(
        self,
        at_once: int,
        most: int,
        is_fixed: bool,
        queue: Callable[[], Queue | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with a number of requests at a time.

        Args:
            at_once: Requests at a time.
            most: Requests at a time at most.
            is_fixed: Whether the number stays as it is.
            queue: Reads the server's queue.
            clock: Seconds since some moment.
        """
        self.most = most
        self.at_once = min(at_once, most)
        self.steps: list[Step] = []
        self._is_settled = is_fixed
        self._read = queue
        self._clock = clock
        self._under_way = 0
        self._answers = 0
        self._not_counted = 0
        self._counted = 0
        self._changed = threading.Condition()
        self._best: Step | None = None
        self._without_gain = 0
        self._last_read = 0.0
        self._begin_step()

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Wait until a request may be sent, and count it as under way inside the `with` block."""
        with self._changed:
            self._changed.wait_for(lambda: self._under_way < self.at_once)
            self._under_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify()

    def answered(self) -> None:
        """Count an answer; the number of requests at a time may change by it."""
        now = self._clock()
        with self._changed:
            ends_step = self._answers + 1 == self._not_counted + self._counted
            is_due = ends_step or now - self._last_read >= _READ_SECONDS
            if is_due:
                self._last_read = now
        queue = self._read() if is_due else None
        with self._changed:
            if queue is not None:
                self._queues.append(queue)
            self._answers += 1
            if self._answers == self._not_counted:
                self._started = now
            if not self._is_settled and self._answers == self._not_counted + self._counted:
                self._end_step(now)

    def finish(self) -> None:
        """End the measurement: what the last step has measured is kept."""
        with self._changed:
            if self._answers > self._not_counted:
                self.steps.append(self._measured(self._clock()))
                self._begin_step()

    def _begin_step(self) -> None:
        self._answers = 0
        self._queues: list[Queue] = []
        self._started = self._clock()
        self._not_counted = 0 if self._is_settled else self.at_once
        self._counted = max(_LEAST_ANSWERS, 2 * self.at_once)

    def _measured(self, now: float) -> Step:
        queues = self._queues
        running = waiting = None
        if queues:
            running = sum(queue.running for queue in queues) / len(queues)
            waiting = sum(queue.waiting for queue in queues) / len(queues)
        answers = self._answers - self._not_counted
        return Step(self.at_once, answers, now - self._started, running, waiting)

    def _end_step(self, now: float) -> None:
        """Judge the step that has ended: settle, or try more requests at a time."""
        step = self._measured(now)
        self.steps.append(step)
        if self._best is None or step.rate > _FASTER * self._best.rate:
            self._best = step
            self._without_gain = 0
        else:
            self._without_gain += 1
        always_waiting = bool(self._queues) and all(queue.waiting for queue in self._queues)
        is_last = always_waiting or self.at_once == self.most
        if is_last or self._without_gain == _STEPS_WITHOUT_GAIN:
            self._is_settled = True
            self.at_once = self._best.at_once
        else:
            self.at_once = min(_GROWTH * self.at_once, self.most)
        self._begin_step()
        self._changed.notify_all()
