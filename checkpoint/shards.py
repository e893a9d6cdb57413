"""Safetensors shards in which every tensor has its place before the first is computed.

A tensor is written as soon as it is finished, in any order and from any thread, and again after a
restart; no shard is ever gathered in memory. The bytes are those of `safetensors.torch.save_file`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

import torch

from checkpoint.files import DTYPES, SINGLE, bytes_of
from checkpoint.layout import TensorSpec, spec_bytes, split_by_size

# safetensors 0.8 lays tensors out by dtype in this order, then by name, so that each is aligned.
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "F8_E4M3", "I8", "U8", "BOOL")
_THREADS = 4
# Groups of tensors on their way to the disk; a layer of the 12B is 0.1 to 0.2 GB, or twice that in
# BF16.
_GROUPS_AHEAD = 3


class Shards:
    """The files of a checkpoint, laid out from names, shapes and dtypes alone.

    Attributes:
        directory: Where the files are, made by `open_shards`.
        specs: Shape and dtype of every tensor.
        weight_map: File name of every tensor.
        written: Names written by this process.
    """

    def __init__(self, directory: Path, specs: Mapping[str, TensorSpec], shard_bytes: int) -> None:
        self.directory, self.specs = directory, specs
        self.weight_map: dict[str, str] = {}
        self.written: set[str] = set()
        self._start: dict[str, int] = {}
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        planned = split_by_size(specs, shard_bytes)
        for number, names in enumerate(planned, start=1):
            file = (
                SINGLE
                if len(planned) == 1
                else f"model-{number:05d}-of-{len(planned):05d}.safetensors"
            )
            self._lay_out(file, {name: specs[name] for name in names})

    def _lay_out(self, file: str, specs: Mapping[str, TensorSpec]) -> None:
        self.weight_map.update(dict.fromkeys(specs, file))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(specs, key=lambda name: (_ORDER.index(specs[name].dtype), name)):
            start, end = end, end + spec_bytes({name: specs[name]})
            shape = list(specs[name].shape)
            header[name] = {
                "dtype": specs[name].dtype,
                "shape": shape,
                "data_offsets": [start, end],
            }
            self._start[name] = start
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._headers[file] = len(text).to_bytes(8, "little") + text
        self._sizes[file] = len(self._headers[file]) + end

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(self._sizes.values())

    def create(self) -> None:
        """Make the files at their full size, headers written; what an earlier run has written
        stays.

        Raises:
            OSError: When the disk does not allow files of this size.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        for file, header in self._headers.items():
            path = self.directory / file
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.ftruncate(descriptor, self._sizes[file])
                _write_all(descriptor, memoryview(header), 0, path)
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None
            finally:
                os.close(descriptor)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place.

        Raises:
            AssertionError: When its shape or dtype is not the planned one.
            OSError: When the disk is full.
        """
        spec = self.specs[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != DTYPES[spec.dtype]:
            raise AssertionError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned {spec.dtype} {spec.shape}"
            )
        file = self.weight_map[name]
        path = self.directory / file
        descriptor = os.open(path, os.O_WRONLY)
        try:
            start = len(self._headers[file]) + self._start[name]
            _write_all(descriptor, bytes_of(tensor.cpu().contiguous()), start, path)
        finally:
            os.close(descriptor)
        self.written.add(name)

    def flush(self, names: Mapping[str, object]) -> None:
        """Bring the files that hold `names` onto the disk."""
        for file in sorted({self.weight_map[name] for name in names}):
            descriptor = os.open(self.directory / file, os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)


class Writer:
    """Writes tensors in threads while the caller computes the next ones; use it as a context
    manager.

    Leaving the context waits for everything; an error of a thread is raised at the next `put`, or
    there.
    """

    def __init__(
        self, shards: Shards, progress: Callable[[int], object] = lambda count: None
    ) -> None:
        self.shards, self._progress = shards, progress
        self._threads = ThreadPoolExecutor(_THREADS, "write")
        self._recorder = ThreadPoolExecutor(1, "record")
        self._copiers = ThreadPoolExecutor(2, "copy")
        self._room = threading.Semaphore(_GROUPS_AHEAD)
        self._groups: list[Future[None]] = []
        self._failed = False

    def copy(self, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> None:
        """Write tensors that are ready elsewhere, beside everything that is put; two are in memory
        at a time.

        Args:
            names: Of the tensors.
            read: Gives one; called in a thread.
        """

        def one(name: str) -> None:
            tensor = read(name)
            self.shards.write(name, tensor)
            self._progress(tensor.nbytes)

        self._groups += [self._copiers.submit(one, name) for name in names]

    def put(
        self, tensors: Mapping[str, torch.Tensor], then: Callable[[], None] | None = None
    ) -> None:
        """Write finished tensors; waits while too many are on their way.

        Args:
            tensors: By name, on any device; do not change them any more.
            then: Called when these and all put before them are on the disk.
        """
        self._raise_errors(wait_for_all=False)
        self._room.acquire()
        device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
        ready = torch.cuda.current_stream(device).record_event() if device else None
        writes = [
            self._threads.submit(self._write, name, tensor, ready)
            for name, tensor in tensors.items()
        ]
        size = math.fsum(tensor.nbytes for tensor in tensors.values())
        self._groups.append(
            self._recorder.submit(self._record, writes, dict.fromkeys(tensors), int(size), then)
        )

    def _write(self, name: str, tensor: torch.Tensor, ready: torch.cuda.Event | None) -> None:
        self.shards.write(
            name, tensor if ready is None or not tensor.is_cuda else _fetched(tensor, ready)
        )

    def _record(
        self,
        writes: list[Future[None]],
        names: Mapping[str, None],
        size: int,
        then: Callable[[], None] | None,
    ) -> None:
        try:
            wait(writes)
            for write in writes:
                write.result()
            # At once, beside the computing, rather than all of it at the end.
            self.shards.flush(names)
            if then is not None and not self._failed:
                then()
            self._progress(size)
        except BaseException:
            self._failed = True  # what comes later must not be recorded as if this were on the disk
            raise
        finally:
            self._room.release()

    def _raise_errors(self, wait_for_all: bool) -> None:
        if wait_for_all:
            wait(self._groups)
        running = []
        for group in self._groups:
            if group.done():
                group.result()
            else:
                running.append(group)
        self._groups = running

    def drain(self) -> None:
        """Wait until everything put so far is written and recorded."""
        self._raise_errors(wait_for_all=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.drain()
        finally:
            self._recorder.shutdown(
                cancel_futures=kind is not None
            )  # after an error, what has not begun is dropped
            for threads in (self._threads, self._copiers):
                threads.shutdown(cancel_futures=kind is not None)


def _fetched(tensor: torch.Tensor, ready: torch.cuda.Event) -> torch.Tensor:
    """A GPU's tensor in page-locked memory, copied while the GPU computes on."""
    with torch.cuda.device(tensor.device):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        stream.synchronize()
    return host


def _write_all(descriptor: int, data: memoryview, start: int, path: Path) -> None:
    while data:
        try:
            count = os.pwrite(descriptor, data, start)  # Linux writes at most 2 GiB at once
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or errno.EIO), str(path)) from None
        data, start = data[count:], start + count
