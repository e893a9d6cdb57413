"""Writes a checkpoint as one safetensors file per layer, while the next layers are computed.

A file appears under its name when it is whole and on the disk, so a run that was killed finds out
from the files which layers are finished.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from checkpoint.atomic import write_json, write_tensors
from checkpoint.family import Family
from checkpoint.files import DTYPES, Reader
from checkpoint.layout import Specs, spec_bytes, split_by_size
from checkpoint.other_weights import INDEX

OUTSIDE_BYTES = 400_000_000
"""Largest file of tensors outside the layers, unless a single tensor is larger. One such file is in
memory at a time; the 12B's largest is its embedding matrix of 1.35 GB, alone in its file."""

_LAYERS_AHEAD = 3
"""Layers that wait to be written. A layer of the 12B is 0.1 to 0.4 GB."""

_THREADS = 4


@dataclass(frozen=True)
class Shards:
    """Which tensor is written into which file.

    Attributes:
        specs: Shape and dtype of every tensor.
        outside: Tensor names by file name, for tensors outside the layers.
        layers: (file name, tensor names) of each layer.
    """

    specs: Specs
    outside: Mapping[str, list[str]]
    layers: tuple[tuple[str, list[str]], ...]

    @property
    def weight_map(self) -> dict[str, str]:
        """File name of every tensor, as in model.safetensors.index.json."""
        found = {}
        for file, names in [*self.outside.items(), *self.layers]:
            for name in names:
                found[name] = file
        return {name: found[name] for name in self.specs}

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return spec_bytes(self.specs)


def plan_shards(specs: Specs, family: Family) -> Shards:
    """Assign every tensor to a file: one file per layer, the others by size."""
    by_layer: dict[int, list[str]] = {}
    others = {}
    for name, spec in specs.items():
        layer = family.layer_of(name)
        if layer is None:
            others[name] = spec
        else:
            by_layer.setdefault(layer, []).append(name)
    outside = split_by_size(others, OUTSIDE_BYTES)
    count = len(outside) + len(by_layer)
    files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    first_layer = len(outside)
    layers = []
    for layer in sorted(by_layer):
        layers.append((files[first_layer + layer], by_layer[layer]))
    return Shards(specs, dict(zip(files, outside, strict=False)), tuple(layers))


def write_index(shards: Shards, directory: Path) -> None:
    """Write model.safetensors.index.json."""
    metadata = {"total_size": shards.total_bytes}
    write_json(directory / INDEX, {"metadata": metadata, "weight_map": shards.weight_map})


class ShardWriter:
    """Writes shards in threads. Use it as a context manager: leaving it waits for all of them.

    An error of a thread is raised at the next `put`, at `drain`, or when the context is left.
    """

    def __init__(
        self,
        directory: Path,
        shards: Shards,
        read: Reader,
        on_bytes: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Prepare to write; what lies outside the layers is copied from the first `put` on.

        Until then the caller may hold embeddings and head, which are as large as their copies.
        Files that exist are kept.

        Args:
            directory: Where the files go.
            shards: What goes where.
            read: Returns a tensor that is copied from the source as it is; called in threads.
            on_bytes: Called with the bytes of every file written.
        """
        self.directory = directory
        self.shards = shards
        self._read = read
        self._on_bytes = on_bytes
        self._outside_thread = ThreadPoolExecutor(1, "write-outside")
        self._layer_threads = ThreadPoolExecutor(_THREADS, "write-layer")
        self._recorder = ThreadPoolExecutor(1, "record")
        self._room = threading.Semaphore(_LAYERS_AHEAD)
        self._pending: list[Future[None]] = []
        self._copies_outside = False
        directory.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(directory)

    def put(
        self,
        layer: int,
        tensors: Mapping[str, torch.Tensor],
        then: Callable[[], None] | None = None,
    ) -> None:
        """Write a layer; waits while too many layers are pending.

        Args:
            layer: Its index.
            tensors: Its computed tensors by name, on any device; do not change them any more. The
                layer's other tensors are read from the source.
            then: Called when this layer and all layers put before it are on the disk.
        """
        self._raise_errors()
        self._copy_outside()
        self._room.acquire()
        file, names = self.shards.layers[layer]
        copied = _record_event(tensors)
        writing = self._layer_threads.submit(self._write, file, names, tensors, copied)
        # One thread, so that `then` is called in the order of the layers.
        self._pending.append(self._recorder.submit(self._finish, writing, then))

    def drain(self) -> None:
        """Wait until everything that was put is written, and what lies outside the layers."""
        self._copy_outside()
        wait(self._pending)
        self._raise_errors()

    def _copy_outside(self) -> None:
        """Start copying what lies outside the layers, once."""
        if self._copies_outside:
            return
        self._copies_outside = True
        for file, names in self.shards.outside.items():
            if not (self.directory / file).exists():
                writing = self._outside_thread.submit(self._write, file, names, {}, None)
                self._pending.append(writing)

    def _write(
        self,
        file: str,
        names: list[str],
        tensors: Mapping[str, torch.Tensor],
        ready: torch.cuda.Event | None,
    ) -> None:
        values = {}
        for name in names:
            tensor = tensors.get(name)
            if tensor is None:
                tensor = self._read(name)
            elif tensor.is_cuda and ready is not None:
                tensor = _copy_to_host(tensor, ready)
            self._check(name, tensor)
            values[name] = _unshared(tensor)
        write_tensors(self.directory / file, values)
        self._on_bytes(sum(value.nbytes for value in values.values()))

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        spec = self.shards.specs[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != DTYPES[spec.dtype]:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise AssertionError(f"{name} is {found}, planned is {spec.dtype} {spec.shape}")

    def _finish(self, writing: Future[None], then: Callable[[], None] | None) -> None:
        try:
            writing.result()
            earlier_failed = any(future.done() and future.exception() for future in self._pending)
            if then is not None and not earlier_failed:
                then()
        finally:
            self._room.release()

    def _raise_errors(self) -> None:
        remaining = []
        for future in self._pending:
            if future.done():
                future.result()
            else:
                remaining.append(future)
        self._pending = remaining

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        failed = kind is not None
        try:
            if not failed:
                self.drain()
        finally:
            # After an error, what has not begun is dropped.
            for threads in (self._outside_thread, self._layer_threads, self._recorder):
                threads.shutdown(cancel_futures=failed)


def _remove_unfinished(directory: Path) -> None:
    """Remove the files that a killed run had not finished.

    safetensors writes to a file of its own beside the one that it was given, `.tmp` and six
    letters. Symptom of a kill there: the file becomes part of the result.
    """
    for file in directory.glob(".*"):
        file.unlink()


def _unshared(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor in memory of its own if it is a scalar.

    q, k and v may share a scale tensor, and safetensors refuses tensors that share memory.
    """
    return tensor.clone() if tensor.numel() == 1 else tensor.contiguous()


def _record_event(tensors: Mapping[str, Any]) -> torch.cuda.Event | None:
    """An event recorded after the work that computes the tensors; None on a CPU."""
    for tensor in tensors.values():
        if tensor.is_cuda:
            return torch.cuda.current_stream(tensor.device).record_event()
    return None


def _copy_to_host(tensor: torch.Tensor, ready: torch.cuda.Event) -> torch.Tensor:
    """Copy a GPU's tensor into page-locked memory while the GPU computes on."""
    with torch.cuda.device(tensor.device):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        stream.synchronize()
    return host
