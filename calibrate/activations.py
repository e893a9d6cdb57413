"""Activations of many samples between two layers: in host memory up to a budget, in a file beyond,
never all on a GPU.

A layer replaces each batch by its output. On a GPU, batches come from page-locked memory and go
back to it while others are computed; the host runs ahead of the GPU by a few batches and waits for
nothing else.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.atomic import replaced_file
from checkpoint.files import bytes_of, read_into

# Page-locked memory comes in powers of two: one block holds many samples, so that nothing is lost
# to rounding.
_BLOCK = 1 << 30
# Batches loaded before they are needed, and batches the host may run ahead of the GPU.
_LOAD_AHEAD, _RUN_AHEAD = 2, 3
_COPY = 1 << 26

Batch = tuple[int, ...]
"""Indices of samples of one length that run together."""


@dataclass
class Budget:
    """Host memory that several stores may take.

    Attributes:
        left: Bytes not taken yet.
    """

    left: int


class Activations:
    """The residual stream [length, hidden] of every sample, BF16; samples are numbered in the order
    they are added.

    Attributes:
        lengths: Tokens of each sample.
    """

    def __init__(self, hidden: int, device: str, budget: Budget, spill: Path) -> None:
        """Make an empty store.

        Args:
            hidden: Width of the residual stream.
            device: Where layers run.
            budget: Host memory to take from.
            spill: File for what is beyond; made when it is needed, removed by `close`.
        """
        self.lengths: list[int] = []
        self._hidden, self._device, self._budget, self._spill = hidden, device, budget, spill
        self._cuda = device.startswith("cuda")
        self._slots: list[torch.Tensor | int] = []  # host memory, or the place in the file
        self._block = torch.empty(0, dtype=torch.bfloat16)
        self._spilled = 0
        self._file = -1
        self._threads = ThreadPoolExecutor(1, "load"), ThreadPoolExecutor(1, "store")
        self._stores: deque[Future[None]] = deque()
        self._events: deque[torch.cuda.Event] = deque()
        if self._cuda:
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)

    @property
    def nbytes(self) -> int:
        """Bytes of all samples."""
        return sum(self.lengths) * self._hidden * 2

    def add(self, activations: torch.Tensor) -> None:
        """Add a sample [length, hidden], from any device."""
        self._new_slot(len(activations))
        self._store((len(self.lengths) - 1,), activations[None])

    def _new_slot(self, length: int) -> None:
        count = length * self._hidden
        if len(self._block) < count <= self._budget.left // 2:
            elements = min(max(_BLOCK // 2, count), self._budget.left // 2)
            self._block = torch.empty(elements, dtype=torch.bfloat16, pin_memory=self._cuda)
            self._budget.left -= 2 * elements
        if len(self._block) >= count:
            slot, self._block = self._block[:count].view(length, self._hidden), self._block[count:]
            self._slots.append(slot)
        else:
            if self._file < 0:
                self._file = os.open(self._spill, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            self._slots.append(self._spilled)
            self._spilled += 2 * count
        self.lengths.append(length)

    def batches(self, tokens: int) -> list[Batch]:
        """Samples of equal length together, up to `tokens` tokens or one sample; the longest first."""
        by_length: dict[int, list[int]] = {}
        for index, length in enumerate(self.lengths):
            by_length.setdefault(length, []).append(index)
        return [
            tuple(indices[start : start + size])
            for length, indices in sorted(by_length.items(), reverse=True)
            for size in [max(1, tokens // length)]
            for start in range(0, len(indices), size)
        ]

    def replace(
        self, layer: Callable[[torch.Tensor], torch.Tensor], batches: Sequence[Batch]
    ) -> None:
        """Replace each batch by what `layer` makes of it: [batch, length, hidden] to the same
        shape.
        """
        self._settle()
        for batch, inputs in self._loaded(batches):
            self._store(batch, layer(inputs))
        self._settle()

    def take(self, batch: Batch) -> torch.Tensor:
        """One batch [batch, length, hidden] on the device, left where it is."""
        self._settle()
        return next(self._loaded([batch]))[1]

    def each(self) -> Iterator[torch.Tensor]:
        """Every sample [1, length, hidden] on the device, in order."""
        self._settle()
        for _, inputs in self._loaded([(index,) for index in range(len(self.lengths))]):
            yield inputs

    def _loaded(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
        coming: deque[tuple[Batch, Future[tuple[torch.Tensor, torch.cuda.Event | None]]]] = deque()
        left = iter(batches)
        while True:
            while len(coming) < _LOAD_AHEAD and (batch := next(left, None)) is not None:
                coming.append((batch, self._threads[0].submit(self._load, batch)))
            if not coming:
                return
            batch, loading = coming.popleft()
            inputs, ready = loading.result()
            if ready is not None:
                torch.cuda.current_stream(self._device).wait_event(ready)
                inputs.record_stream(torch.cuda.current_stream(self._device))
            yield batch, inputs

    def _load(self, batch: Batch) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        rows = [self._read(index) for index in batch]
        if not self._cuda:
            return (torch.stack(rows) if len(rows) > 1 else rows[0][None]), None
        with torch.cuda.stream(self._streams[0]):
            shape = (len(batch), *rows[0].shape)
            inputs = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
            for row, target in zip(rows, inputs):
                target.copy_(row, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self._streams[0])
        return inputs, ready

    def _read(self, index: int) -> torch.Tensor:
        slot = self._slots[index]
        if isinstance(slot, torch.Tensor):
            return slot
        row = torch.empty(
            self.lengths[index], self._hidden, dtype=torch.bfloat16, pin_memory=self._cuda
        )
        read_into(self._file, row, slot, self._spill)
        return row

    def _store(self, batch: Batch, outputs: torch.Tensor) -> None:
        outputs = outputs.detach()
        if not self._cuda:
            for index, row in zip(batch, outputs):
                self._keep(index, row)
            return
        store = self._streams[1]
        store.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(store):
            for index, row in zip(batch, outputs):
                slot = self._slots[index]
                if isinstance(slot, torch.Tensor):
                    slot.copy_(row, non_blocking=True)
                    continue
                staged = torch.empty(row.shape, dtype=torch.bfloat16, pin_memory=True)
                staged.copy_(row, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record(store)
                self._write_later(self._write_staged, index, staged, copied)
        outputs.record_stream(store)
        done = torch.cuda.Event()
        done.record(store)
        self._events.append(done)
        if len(self._events) > _RUN_AHEAD:  # or the whole layer's inputs would be allocated at once
            self._events.popleft().synchronize()

    def _keep(self, index: int, row: torch.Tensor) -> None:
        slot = self._slots[index]
        if isinstance(slot, torch.Tensor):
            slot.copy_(row)
        else:
            self._write_later(self._write, slot, row.to("cpu", torch.bfloat16, copy=True))

    def _write_later(self, write: Callable[..., None], *arguments: object) -> None:
        self._stores.append(self._threads[1].submit(write, *arguments))
        if (
            len(self._stores) > _RUN_AHEAD
        ):  # a slow disk holds the layer up rather than filling the memory
            self._stores.popleft().result()

    def _write_staged(self, index: int, staged: torch.Tensor, copied: torch.cuda.Event) -> None:
        copied.synchronize()
        slot = self._slots[index]
        assert isinstance(slot, int)
        self._write(slot, staged)

    def _write(self, start: int, row: torch.Tensor) -> None:
        _write_all(self._file, bytes_of(row), start, self._spill)

    def _settle(self) -> None:
        """Let nothing be loaded before what was computed of it is stored."""
        for store in self._stores:
            store.result()
        self._stores.clear()
        if self._cuda:
            self._streams[0].wait_stream(self._streams[1])

    def save(self, path: Path) -> None:
        """Write all samples, one behind the other, to a file that is whole or absent."""
        self._settle()
        if self._cuda:
            self._streams[1].synchronize()
        start = 0
        with replaced_file(path) as partial, partial.open("wb", buffering=0) as file:
            for index in range(len(self.lengths)):
                data = bytes_of(self._read(index))
                _write_all(file.fileno(), data, start, path)
                start += len(data)

    def restore(self, path: Path, lengths: Sequence[int]) -> None:
        """Fill an empty store with samples of these lengths that `save` wrote.

        Raises:
            OSError: When the file is shorter than they are.
        """
        descriptor = os.open(path, os.O_RDONLY)
        start = 0
        try:
            for length in lengths:
                self._new_slot(length)
                slot = self._slots[-1]
                row = (
                    slot
                    if isinstance(slot, torch.Tensor)
                    else torch.empty(length, self._hidden).bfloat16()
                )
                read_into(descriptor, row, start, path)
                if isinstance(slot, int):
                    self._write(slot, row)
                start += row.nbytes
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Give memory and file back."""
        for threads in self._threads:
            threads.shutdown(cancel_futures=True)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        with contextlib.suppress(FileNotFoundError):
            self._spill.unlink()
        self._slots.clear()
        self._block = torch.empty(0, dtype=torch.bfloat16)


def _write_all(descriptor: int, data: memoryview, start: int, path: Path) -> None:
    while data:
        try:
            count = os.pwrite(descriptor, data[:_COPY], start)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None
        data, start = data[count:], start + count
