"""Safetensors files of a checkpoint directory, single or sharded: their headers, and one tensor at
a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from checkpoint.dtypes import FULL, TORCH_NAMES
from checkpoint.faults import Fault, raise_if_any, shortened
from checkpoint.layout import Specs, TensorSpec
from checkpoint.other_weights import INDEX, SINGLE
from checkpoint.weight_files import file_faults, read_weight_map

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, own) for name, own in TORCH_NAMES.items()}
"""torch's dtypes by the names that safetensors gives them."""

Result = TypeVar("Result")
Reader = Callable[[str], torch.Tensor]
"""Returns the tensor of a name."""

THREADS = 8
"""Threads that read and compare tensors. Each holds one tensor of the source and a few copies of a
part of it.
"""
_ROUNDED_AT_ONCE = 1 << 20
"""Values of another dtype in memory at once, per thread, while they are rounded to BF16."""


class TensorFiles:
    """The tensors of one directory, by name. Opening reads headers only; `read` reads one tensor.

    Attributes:
        directory: Where the files are.
        files: File names, in order.
        specs: Shape and dtype of every tensor found, as `read` returns it.
        stored: The same as it is in the files; another dtype only after `round_to_bf16`.
        location: Name of the file that holds each tensor.

    Raises:
        BadInput: On opening, with every fault: no weights, an index that names files or tensors
            that do not exist, a truncated or corrupt file.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.specs: dict[str, TensorSpec] = {}
        self.stored: Specs = self.specs
        self.location: dict[str, str] = {}
        self._start: dict[str, int] = {}
        self._header_bytes: dict[str, int] = {}
        index = read_weight_map(self.directory)
        self.files = sorted(set(index.values())) if index else [SINGLE]
        faults = [fault for file in self.files for fault in self._read_header(file)]
        if not faults:
            faults = list(self._index_faults(index))
        raise_if_any(faults)

    def _index_faults(self, index: Mapping[str, str]) -> Iterator[Fault]:
        where = str(self.directory / INDEX)
        for name, file in index.items():
            if self.location.get(name) != file:
                what = f"says that {shortened(name)} is in {file}, where it is not"
                yield Fault(where, what, "copy the shard again")
        if not index:
            return
        for name, file in self.location.items():
            if name not in index:
                # vLLM loads every tensor of the files that the index names.
                what = f"does not name {shortened(name)}, which is in {file}"
                yield Fault(where, what, "copy the index and the shards again")

    def _read_header(self, file: str) -> Iterator[Fault]:
        path = self.directory / file
        faults = list(file_faults(path, self.directory))
        if faults:
            yield from faults
            return
        try:
            # safe_open checks the header. Framework "pt" would map the whole file as private
            # memory, which counts against a limit on the process.
            with safe_open(path, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (a safe_open is not a dict)
                    if name in self.location:
                        what = f"holds {shortened(name)}, and so does {self.location[name]}"
                        yield Fault(str(path), what, "copy the index and the shards again")
                        return
                    part = opened.get_slice(name)
                    self.specs[name] = TensorSpec(tuple(part.get_shape()), part.get_dtype())
                    self.location[name] = file
            with path.open("rb") as raw:
                size = int.from_bytes(raw.read(8), "little")
                header = json.loads(raw.read(size))
            self._header_bytes[file] = 8 + size
            for name, entry in header.items():
                if name in self.specs:
                    self._start[name] = 8 + size + entry["data_offsets"][0]
        except (SafetensorError, OSError, ValueError) as error:
            what = f"is not a safetensors file: {shortened(error)}"
            yield Fault(str(path), what, "copy the file again")

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def round_to_bf16(self, expected: Specs) -> None:
        """Let `read` round to BF16 what fine-tuning has saved as float32 or float16.

        Args:
            expected: The tensors there should be. Those that are not BF16 here stay as they are,
                and so do tensors that are not named.
        """
        rounded = {}
        for name, spec in self.stored.items():
            wanted = expected.get(name)
            if wanted is not None and wanted.dtype == "BF16" and spec.dtype in FULL:
                rounded[name] = TensorSpec(spec.shape, "BF16")
        self.specs = {**self.stored, **rounded}

    @property
    def rounded(self) -> list[str]:
        """Names of the tensors that `read` rounds to BF16."""
        return [name for name, spec in self.specs.items() if spec != self.stored[name]]

    def where(self, name: str) -> str:
        """How a fault names a tensor: by its file and its name."""
        return f"{self.directory / self.location[name]}: {name}"

    def in_file(self, file: str) -> list[str]:
        """Names of the tensors of one file, in the order of their bytes."""
        names = [name for name, other in self.location.items() if other == file]
        return sorted(names, key=lambda name: self._start[name])

    def header_bytes(self, file: str) -> int:
        """Bytes of a file in front of its first tensor."""
        return self._header_bytes[file]

    def read(
        self, name: str, pin: bool = False, rows: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Read one tensor into memory of its own. Several threads may read at once.

        What `round_to_bf16` has found is rounded to the nearest, ties to even, in parts: the
        values of the file are never in memory as a whole.

        The file is not mapped: pages of a mapped file stay in the process until the whole file is
        closed, and count against the memory limit of a run that must hold one layer at a time.

        Args:
            name: As in the files.
            pin: Whether to read into page-locked memory, from which a GPU can copy asynchronously.
            rows: Reads these rows only, from the first number up to but without the second.

        Raises:
            OSError: The file is gone or has become shorter.
        """
        stored = self.stored[name]
        shape = stored.shape
        start = self._start[name]
        if rows is not None:
            start += rows[0] * (stored.nbytes // shape[0])
            shape = (rows[1] - rows[0], *shape[1:])
        tensor = torch.empty(shape, dtype=DTYPES[self.specs[name].dtype], pin_memory=pin)
        path = self.directory / self.location[name]
        with path.open("rb", buffering=0) as file:
            if stored.dtype == self.specs[name].dtype:
                read_into(file.fileno(), tensor, start, path)
            else:
                _read_rounded(file.fileno(), tensor, DTYPES[stored.dtype], start, path)
        return tensor

    @property
    def total_bytes(self) -> int:
        """Size of all weight files on disk."""
        return sum((self.directory / file).stat().st_size for file in self.files)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    flat: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def read_into(descriptor: int, tensor: torch.Tensor, start: int, path: Path) -> None:
    """Fill a contiguous tensor on the CPU with a file's bytes from `start`.

    Raises:
        OSError: The file ends before.
    """
    left = bytes_of(tensor)
    while left:
        count = os.preadv(descriptor, [left], start)  # Linux reads at most 2 GiB at once
        if not count:
            raise OSError(f"{path}: ends before byte {start + len(left)}")
        left = left[count:]
        start += count


def _read_rounded(
    descriptor: int, tensor: torch.Tensor, dtype: torch.dtype, start: int, path: Path
) -> None:
    """Fill a tensor with a file's values of another dtype from byte `start`; as `read_into`."""
    flat = tensor.view(-1)
    buffer = torch.empty(min(len(flat), _ROUNDED_AT_ONCE), dtype=dtype)
    for first in range(0, len(flat), _ROUNDED_AT_ONCE):
        part = flat[first : first + _ROUNDED_AT_ONCE]
        values = buffer[: len(part)]
        read_into(descriptor, values, start + first * dtype.itemsize, path)
        part.copy_(values)


def layout_faults(
    found: Specs, expected: Specs, where: str, optional: Iterable[str] = ()
) -> list[Fault]:
    """Compare the tensors of a directory with those that its config requires.

    vLLM loads a checkpoint with missing, extra or mis-shaped tensors without an error.

    Args:
        found: The tensors there are.
        expected: The tensors there should be.
        where: The directory, for the message.
        optional: Names that may be missing or present.
    """
    remedy = "is this the checkpoint that config.json describes?"
    allowed = set(optional)
    faults = []
    for name in expected:
        if name not in found and name not in allowed:
            faults.append(Fault(where, f"tensor {name} is missing", remedy))
    for name, spec in found.items():
        if name not in expected:
            if name not in allowed:
                what = f"tensor {name} is not part of this architecture"
                faults.append(Fault(where, what, remedy))
        elif spec != expected[name]:
            want = expected[name]
            is_now = f"{spec.dtype} {list(spec.shape)}"
            should_be = f"{want.dtype} {list(want.shape)}"
            faults.append(Fault(where, f"tensor {name} is {is_now}, not {should_be}", remedy))
    return faults


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a floating-point tensor contains neither NaN nor infinity.

    Its extremes are tested, which propagate NaN: for BF16 on a CPU this is 14 times as fast as
    `torch.isfinite` on every element.
    """
    if tensor.numel() == 0:
        return True
    smallest, largest = torch.aminmax(tensor)
    return bool(torch.isfinite(smallest)) and bool(torch.isfinite(largest))


def in_threads(
    work: Callable[[str], Result], names: Iterable[str], most: int = THREADS
) -> Iterator[Result]:
    """Yield the results of `work` in the order of `names`, computed in several threads."""
    with ThreadPoolExecutor(min(most, os.cpu_count() or 1)) as threads:
        yield from threads.map(work, names)
