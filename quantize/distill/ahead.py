"""The next step's samples are made while a step trains: decoded by a thread, embedded between rows.

Decoding takes the CPU as long as a row takes the GPU where samples are long clips. Embedding takes
the GPU and its memory, so it waits until a row is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from checkpoint.faults import BadInput
from quantize.distill.batches import Batch, Prepared

_DECODED = 16
"""Samples that wait decoded: about one row of 16,384 tokens. A clip of 128 frames takes 0.4 GB."""


@dataclass(frozen=True)
class Turn:
    """A sample at its turn.

    Attributes:
        position: Its place in all passes.
        number: Its place in a pass.
        rate: Its EVS rate.
        result: What has become of it: prepared, a batch, or why it cannot be used. None if it is
            known already that it cannot be used at this rate.
    """

    position: int
    number: int
    rate: float
    result: Prepared | Batch | BadInput | None


class MadeAhead:
    """An iterator of samples with their batches.

    Only what is asked for is judged: an error among later samples is raised at its turn.
    """

    def __init__(self, prepared: Iterator[Turn], embed: Callable[[Prepared], Batch]) -> None:
        """Begin to decode.

        Args:
            prepared: Iterated in a thread.
            embed: Makes a batch; called in the thread that iterates.
        """
        self._prepared = prepared
        self._embed = embed
        self._thread = ThreadPoolExecutor(1, "decode")
        self._waiting: deque[Future[Turn | None]] = deque()
        self._embedded: deque[Turn] = deque()
        for _ in range(_DECODED):
            self._submit()

    def __iter__(self) -> Iterator[Turn]:
        return self

    def __next__(self) -> Turn:
        if self._embedded:
            return self._embedded.popleft()
        turn = self._waiting.popleft().result()
        if turn is None:
            raise StopIteration
        self._submit()
        return self._with_batch(turn)

    def embed_decoded(self, most: int) -> None:
        """Embed the samples that are decoded by now.

        Args:
            most: Samples that may wait embedded.
        """
        while len(self._embedded) < most and self._waiting[0].done():
            if self._waiting[0].exception() is not None:
                return
            turn = self._waiting[0].result()
            if turn is None:
                return
            self._waiting.popleft()
            self._submit()
            self._embedded.append(self._with_batch(turn))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        self._waiting.append(self._thread.submit(next, self._prepared, None))

    def _with_batch(self, turn: Turn) -> Turn:
        prepared: Any = turn.result
        if prepared is None or isinstance(prepared, BadInput):
            return turn
        try:
            return replace(turn, result=self._embed(prepared))
        except BadInput as bad:
            return replace(turn, result=bad)
