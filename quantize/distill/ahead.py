"""The next step's samples are made while a step trains: decoded by a thread, embedded between rows.

Decoding takes the CPU as long as a row takes the GPU where samples are long clips. Embedding takes
the GPU and its memory, so it waits until a row is done.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from checkpoint.faults import BadInput, Fault
from quantize.distill.rows import Prepared, Row

_MOST_DECODED = 16
"""Samples that wait decoded: about one row of 16,384 tokens. A clip of 128 frames takes 0.4 GB."""

_SECONDS_TO_END = 3.0
"""How long `close` waits for the sample that is being decoded."""


@dataclass(frozen=True)
class Place:
    """A sample's place in the endless row of all passes.

    Attributes:
        position: In all passes.
        number: In its pass.
        rate: Its EVS rate there.
        left_out: Faults of the rows of a source that were left out since the sample before, each
            by itself: they are no samples.
    """

    position: int
    number: int
    rate: float
    left_out: tuple[tuple[Fault, ...], ...] = ()


Decoded = tuple[Place, Prepared | BadInput | None]
"""A sample that is decoded, or why it cannot be used; None if that is known already."""

Embedded = tuple[Place, Row | BadInput | None]
"""A sample that is embedded, or why it cannot be used; None if that is known already."""


@dataclass(frozen=True)
class _End:
    """What comes after the last sample.

    Attributes:
        error: What ended the samples; StopIteration if there are no more.
    """

    error: BaseException


class MadeAhead:
    """An iterator of samples with their rows.

    Only what is asked for is judged: an error among later samples is raised at its turn, and again
    whenever another sample is asked for.
    """

    def __init__(self, samples: Iterator[Decoded], embed: Callable[[Prepared], Row]) -> None:
        """Begin to decode.

        Args:
            samples: Iterated in a thread.
            embed: Makes a row; called in the thread that iterates.
        """
        self._samples = samples
        self._embed = embed
        self._decoded: queue.SimpleQueue[Decoded | _End] = queue.SimpleQueue()
        self._embedded: deque[Embedded | _End] = deque()
        self._free_places = threading.Semaphore(_MOST_DECODED)
        self._is_closed = False
        # A daemon, unlike the threads of concurrent.futures: the process does not wait at its end
        # for a source that does not answer.
        self._thread = threading.Thread(target=self._decode, name="decode", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Embedded]:
        return self

    def __next__(self) -> Embedded:
        if not self._embedded:
            self._embed_one(self._decoded.get())
        first = self._embedded[0]
        if isinstance(first, _End):
            raise first.error
        self._embedded.popleft()
        return first

    def embed_decoded(self, most: int) -> None:
        """Embed the samples that are decoded by now.

        Args:
            most: Samples that may wait embedded.
        """
        while len(self._embedded) < most:
            try:
                decoded = self._decoded.get_nowait()
            except queue.Empty:
                return
            self._embed_one(decoded)

    def close(self) -> None:
        """End the thread. One that waits for its source ends when the source answers."""
        self._is_closed = True
        self._free_places.release()
        self._thread.join(_SECONDS_TO_END)

    def _decode(self) -> None:
        """Decode, in the thread, until the samples end or `close` is called."""
        while True:
            self._free_places.acquire()
            if self._is_closed:
                return
            try:
                decoded = next(self._samples)
            except BaseException as error:  # raised again by the thread that iterates
                self._decoded.put(_End(error))
                return
            self._decoded.put(decoded)

    def _embed_one(self, decoded: Decoded | _End) -> None:
        """Append what comes of a decoded sample to those that wait embedded."""
        self._free_places.release()
        if isinstance(decoded, _End):
            self._embedded.append(decoded)
            return
        place, prepared = decoded
        if prepared is None or isinstance(prepared, BadInput):
            self._embedded.append((place, prepared))
            return
        try:
            self._embedded.append((place, self._embed(prepared)))
        except BadInput as bad:
            self._embedded.append((place, bad))
        except Exception as error:
            self._embedded.append(_End(error))
