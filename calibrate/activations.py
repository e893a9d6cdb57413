"""Activations of many samples between two layers: in host memory up to a budget, in a file beyond.

A layer replaces each batch by its output. On a GPU, batches come from page-locked memory and return
to it while others are computed; the host runs ahead of the GPU by a few batches.
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

_BLOCK_BYTES = 1 << 30
"""Page-locked memory is allocated in powers of two: one block holds many samples, so that nothing
is lost to rounding."""

_LOAD_AHEAD = 2
"""Batches on the device that wait for the layer, the one that it receives next included."""

_RUN_AHEAD = 3
"""Batches by which the host may run ahead of the GPU, or of the disk."""

_WRITE_BYTES = 1 << 26
"""Bytes that are written to a file at once."""

Batch = tuple[int, ...]
"""Indices of samples of one length that run together."""

Loaded = tuple[torch.Tensor, "torch.cuda.Event | None"]
"""A batch on the device, and, on a GPU, the event recorded after its copy."""


@dataclass
class Budget:
    """Host memory that several stores may take.

    Attributes:
        left: Bytes that are not taken yet.
    """

    left: int


class Activations:
    """The residual stream [length, hidden] of every sample in BF16, numbered as they are added.

    Attributes:
        lengths: Tokens of each sample.
    """

    def __init__(self, hidden: int, device: str, budget: Budget, spill: Path) -> None:
        """Create an empty store.

        Args:
            hidden: Width of the residual stream.
            device: Where layers run.
            budget: Host memory to take from.
            spill: File for what exceeds the budget; created when needed, removed by `close`.
        """
        self.lengths: list[int] = []
        self._hidden = hidden
        self._device = device
        self._cuda = device.startswith("cuda")
        self._budget = budget
        self._spill = spill
        self._spilled_bytes = 0
        self._descriptor = -1
        # A slot is a piece of host memory, or the place of the sample in the file.
        self._slots: list[torch.Tensor | int] = []
        self._block = torch.empty(0, dtype=torch.bfloat16)
        self._load_thread = ThreadPoolExecutor(1, "load")
        self._store_thread = ThreadPoolExecutor(1, "store")
        self._file_writes: deque[Future[None]] = deque()
        self._stored: deque[torch.cuda.Event] = deque()
        if self._cuda:
            self._load_stream = torch.cuda.Stream(device)
            self._store_stream = torch.cuda.Stream(device)

    @property
    def nbytes(self) -> int:
        """Bytes of all samples."""
        return sum(self.lengths) * self._hidden * 2

    def add(self, activations: torch.Tensor) -> None:
        """Add a sample [length, hidden], from any device."""
        self._add_slot(len(activations))
        last = len(self.lengths) - 1
        self._store((last,), activations[None])

    def _add_slot(self, length: int) -> None:
        """Reserve memory for a sample, or its place in the file."""
        elements = length * self._hidden
        affordable = self._budget.left // 2
        if len(self._block) < elements <= affordable:
            size = min(max(_BLOCK_BYTES // 2, elements), affordable)
            self._block = torch.empty(size, dtype=torch.bfloat16, pin_memory=self._cuda)
            self._budget.left -= 2 * size
        if len(self._block) >= elements:
            self._slots.append(self._block[:elements].view(length, self._hidden))
            self._block = self._block[elements:]
        else:
            if self._descriptor < 0:
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
                self._descriptor = os.open(self._spill, flags, 0o600)
            self._slots.append(self._spilled_bytes)
            self._spilled_bytes += 2 * elements
        self.lengths.append(length)

    def batches(self, tokens: int) -> list[Batch]:
        """Group samples of equal length, up to `tokens` tokens or one sample; longest first."""
        by_length: dict[int, list[int]] = {}
        for index, length in enumerate(self.lengths):
            by_length.setdefault(length, []).append(index)
        batches = []
        for length in sorted(by_length, reverse=True):
            indices = by_length[length]
            size = max(1, tokens // length)
            for start in range(0, len(indices), size):
                batches.append(tuple(indices[start : start + size]))
        return batches

    def replace(
        self, layer: Callable[[torch.Tensor], torch.Tensor], batches: Sequence[Batch]
    ) -> None:
        """Replace each batch [batch, length, hidden] by the output of `layer`."""
        self._settle()
        for batch, inputs in self._load_all(batches):
            self._store(batch, layer(inputs))
        self._settle()

    def take(self, batch: Batch) -> torch.Tensor:
        """Return one batch [batch, length, hidden] on the device; the store keeps it."""
        self._settle()
        _, inputs = next(self._load_all([batch]))
        return inputs

    def each(self) -> Iterator[torch.Tensor]:
        """Yield every sample [1, length, hidden] on the device, in order."""
        self._settle()
        singles = [(index,) for index in range(len(self.lengths))]
        for _, inputs in self._load_all(singles):
            yield inputs

    def _load_all(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Yield every batch on the device; the next ones are loaded meanwhile."""
        coming: deque[tuple[Batch, Future[Loaded]]] = deque()
        for batch in batches:
            coming.append((batch, self._load_thread.submit(self._load, batch)))
            if len(coming) >= _LOAD_AHEAD:
                yield self._wait_for(*coming.popleft())
        while coming:
            yield self._wait_for(*coming.popleft())

    def _wait_for(self, batch: Batch, loading: Future[Loaded]) -> tuple[Batch, torch.Tensor]:
        inputs, ready = loading.result()
        if ready is not None:
            compute = torch.cuda.current_stream(self._device)
            compute.wait_event(ready)
            inputs.record_stream(compute)
        return batch, inputs

    def _load(self, batch: Batch) -> Loaded:
        rows = [self._read(index) for index in batch]
        if not self._cuda:
            # A single sample is not copied.
            return (torch.stack(rows) if len(rows) > 1 else rows[0][None]), None
        with torch.cuda.stream(self._load_stream):
            shape = (len(batch), *rows[0].shape)
            inputs = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
            for row, target in zip(rows, inputs, strict=True):
                target.copy_(row, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self._load_stream)
        return inputs, ready

    def _read(self, index: int) -> torch.Tensor:
        slot = self._slots[index]
        if isinstance(slot, torch.Tensor):
            return slot
        shape = (self.lengths[index], self._hidden)
        row = torch.empty(shape, dtype=torch.bfloat16, pin_memory=self._cuda)
        read_into(self._descriptor, row, slot, self._spill)
        return row

    def _store(self, batch: Batch, outputs: torch.Tensor) -> None:
        outputs = outputs.detach()
        if self._cuda:
            self._store_from_gpu(batch, outputs)
            return
        for index, row in zip(batch, outputs, strict=True):
            slot = self._slots[index]
            if isinstance(slot, torch.Tensor):
                slot.copy_(row)
            else:
                copy = row.to("cpu", torch.bfloat16, copy=True)
                self._write_later(self._write, slot, copy)

    def _store_from_gpu(self, batch: Batch, outputs: torch.Tensor) -> None:
        self._store_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._store_stream):
            for index, row in zip(batch, outputs, strict=True):
                slot = self._slots[index]
                if isinstance(slot, torch.Tensor):
                    slot.copy_(row, non_blocking=True)
                    continue
                staged = torch.empty(row.shape, dtype=torch.bfloat16, pin_memory=True)
                staged.copy_(row, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record(self._store_stream)
                self._write_later(self._write_staged, slot, staged, copied)
        outputs.record_stream(self._store_stream)
        done = torch.cuda.Event()
        done.record(self._store_stream)
        self._stored.append(done)
        if len(self._stored) > _RUN_AHEAD:  # or all of the layer's inputs would be allocated
            self._stored.popleft().synchronize()

    def _write_later(self, write: Callable[..., None], *arguments: object) -> None:
        self._file_writes.append(self._store_thread.submit(write, *arguments))
        if len(self._file_writes) > _RUN_AHEAD:  # a slow disk must not fill the memory
            self._file_writes.popleft().result()

    def _write_staged(self, start: int, staged: torch.Tensor, copied: torch.cuda.Event) -> None:
        copied.synchronize()
        self._write(start, staged)

    def _write(self, start: int, row: torch.Tensor) -> None:
        _write_all(self._descriptor, bytes_of(row), start, self._spill)

    def _settle(self) -> None:
        """Wait until everything computed is stored, so that it can be loaded."""
        for writing in self._file_writes:
            writing.result()
        self._file_writes.clear()
        if self._cuda:
            self._load_stream.wait_stream(self._store_stream)

    def save(self, path: Path) -> None:
        """Write all samples, one after the other; the file appears whole or not at all."""
        self._settle()
        if self._cuda:
            self._store_stream.synchronize()
        start = 0
        with replaced_file(path) as partial, partial.open("wb", buffering=0) as file:
            for index in range(len(self.lengths)):
                data = bytes_of(self._read(index))
                _write_all(file.fileno(), data, start, path)
                start += len(data)

    def restore(self, path: Path, lengths: Sequence[int]) -> None:
        """Fill an empty store with samples of these lengths that `save` wrote.

        Raises:
            OSError: The file is shorter.
        """
        start = 0
        with path.open("rb", buffering=0) as file:
            for length in lengths:
                self._add_slot(length)
                slot = self._slots[-1]
                if isinstance(slot, torch.Tensor):
                    read_into(file.fileno(), slot, start, path)
                else:
                    row = torch.empty((length, self._hidden), dtype=torch.bfloat16)
                    read_into(file.fileno(), row, start, path)
                    self._write(slot, row)
                start += 2 * length * self._hidden

    def close(self) -> None:
        """Release memory and remove the file."""
        for thread in (self._load_thread, self._store_thread):
            thread.shutdown(cancel_futures=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        with contextlib.suppress(FileNotFoundError):
            self._spill.unlink()
        self._slots.clear()
        self._block = torch.empty(0, dtype=torch.bfloat16)


def _write_all(descriptor: int, data: memoryview, start: int, path: Path) -> None:
    """Write bytes at a place in a file.

    Raises:
        OSError: The disk is full; it names the file.
    """
    while data:
        try:
            count = os.pwrite(descriptor, data[:_WRITE_BYTES], start)
        except OSError as error:
            message = os.strerror(error.errno or 0)
            raise OSError(error.errno, message, str(path)) from None
        data = data[count:]
        start += count
