"""The next step's samples are made while a step trains: decoded by a thread, embedded between rows.

Decoding takes the CPU as long as a row takes the GPU where samples are long clips. Embedding takes
the GPU and its memory, so it waits until a row is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from checkpoint.faults import BadInput
from quantize.distill.rows import Prepared, Row

_DECODED = 16
"""Samples that wait decoded: about one row of 16,384 tokens. A clip of 128 frames takes 0.4 GB."""


@dataclass(frozen=True)
class Place:
    """A sample's place in the endless row of all passes.

    Attributes:
        position: In all passes.
        number: In its pass.
        rate: Its EVS rate there.
    """

    position: int
    number: int
    rate: float


Decoded = tuple[Place, Prepared | BadInput | None]
"""A sample that is decoded, or why it cannot be used; None if that is known already."""

Embedded = tuple[Place, Row | BadInput | None]
"""A sample that is embedded, or why it cannot be used; None if that is known already."""


class MadeAhead:
    """An iterator of samples with their rows.

    Only what is asked for is judged: an error among later samples is raised at its turn.
    """

    def __init__(self, decoded: Iterator[Decoded], embed: Callable[[Prepared], Row]) -> None:
        """Begin to decode.

        Args:
            decoded: Iterated in a thread.
            embed: Makes a row; called in the thread that iterates.
        """
        self._decoded = decoded
        self._embed = embed
        self._thread = ThreadPoolExecutor(1, "decode")
        self._waiting: deque[Future[Decoded | None]] = deque()
        self._embedded: deque[Embedded] = deque()
        for _ in range(_DECODED):
            self._submit()

    def __iter__(self) -> Iterator[Embedded]:
        return self

    def __next__(self) -> Embedded:
        if self._embedded:
            return self._embedded.popleft()
        decoded = self._waiting.popleft().result()
        if decoded is None:
            raise StopIteration
        self._submit()
        return self._with_row(decoded)

    def embed_decoded(self, most: int) -> None:
        """Embed the samples that are decoded by now.

        Args:
            most: Samples that may wait embedded.
        """
        while len(self._embedded) < most and self._waiting[0].done():
            if self._waiting[0].exception() is not None:
                return
            decoded = self._waiting[0].result()
            if decoded is None:
                return
            self._waiting.popleft()
            self._submit()
            self._embedded.append(self._with_row(decoded))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        self._waiting.append(self._thread.submit(next, self._decoded, None))

    def _with_row(self, decoded: Decoded) -> Embedded:
        place, prepared = decoded
        if prepared is None or isinstance(prepared, BadInput):
            return place, prepared
        try:
            return place, self._embed(prepared)
        except BadInput as bad:
            return place, bad
