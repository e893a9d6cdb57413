"""Safetensors files of a checkpoint directory, single or sharded: what is in them, and one tensor
at a time.
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
from tqdm import tqdm

from checkpoint.config import CheckpointConfig, read_json
from checkpoint.faults import BadInput, Fault, raise_if_any
from checkpoint.layout import OPTIONAL, TensorSpec, expected_tensors

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Result = TypeVar("Result")
THREADS = 8
"""Threads that read and compare tensors; each holds one tensor of the source and a few copies of a
part of it.
"""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class TensorFiles:
    """The tensors of one directory, by name. Opening reads headers only; `read` reads one tensor.

    Attributes:
        directory: Where the files are.
        files: File names, in order.
        specs: Shape and dtype of every tensor found.
        location: Name of the file that holds each tensor.

    Raises:
        BadInput: On opening, with every fault: no weights, an index that names files or tensors
            that are not there, a truncated or corrupt file.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.specs: dict[str, TensorSpec] = {}
        self.location: dict[str, str] = {}
        self._start: dict[str, int] = {}
        indexed: dict[str, str] = {}
        if (self.directory / INDEX).exists():
            weight_map = read_json(self.directory / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(file, str) for file in weight_map.values()
            ):
                raise BadInput(
                    Fault(str(self.directory / INDEX), "holds no weight_map", "copy the file again")
                )
            indexed = weight_map
            self.files = sorted(set(indexed.values()))
        elif (self.directory / SINGLE).exists():
            self.files = [SINGLE]
        else:
            raise BadInput(
                Fault(
                    str(self.directory), f"holds neither {INDEX} nor {SINGLE}", "copy the weights"
                )
            )
        faults = [fault for file in self.files for fault in self._read_header(file)]
        faults += [
            Fault(
                str(self.directory / INDEX),
                f"says {name} is in {file}, where it is not",
                "copy the shard again",
            )
            for name, file in indexed.items()
            if not faults and self.location.get(name) != file
        ]
        raise_if_any(faults)

    def _read_header(self, file: str) -> Iterator[Fault]:
        path = self.directory / file
        try:
            # For its checks of the header; "pt" would map the whole file as private memory, against
            # any limit on it.
            with safe_open(path, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (a safe_open is no dict)
                    part = opened.get_slice(name)
                    self.specs[name] = TensorSpec(tuple(part.get_shape()), part.get_dtype())
                    self.location[name] = file
            with path.open("rb") as raw:
                size = int.from_bytes(raw.read(8), "little")
                header = json.loads(raw.read(size))
            self._start |= {
                n: 8 + size + part["data_offsets"][0]
                for n, part in header.items()
                if n in self.specs
            }
        except FileNotFoundError:
            yield Fault(str(path), "no such file, though the index names it", "copy the shard")
        except (SafetensorError, OSError, ValueError) as error:
            yield Fault(str(path), f"is truncated or corrupt: {error}", "copy the file again")

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def read(self, name: str, pin: bool = False) -> torch.Tensor:
        """The tensor `name` in memory of its own; several threads may read at once.

        Not mapped: pages of a mapped file stay in the process until the whole file is closed, and
        count against the memory limit of a run that is meant to hold one layer at a time.

        Args:
            name: As in the files.
            pin: Into page-locked memory, from which a GPU can copy while it computes.

        Raises:
            OSError: When the file is gone or has become shorter.
        """
        spec = self.specs[name]
        tensor = torch.empty(spec.shape, dtype=DTYPES[spec.dtype], pin_memory=pin)
        path = self.directory / self.location[name]
        with path.open("rb", buffering=0) as file:
            read_into(file.fileno(), tensor, self._start[name], path)
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
        OSError: When the file ends before.
    """
    left = bytes_of(tensor)
    while left:
        count = os.preadv(descriptor, [left], start)  # Linux reads at most 2 GiB at once
        if not count:
            raise OSError(f"{path}: ends before byte {start + len(left)}")
        left, start = left[count:], start + count


def layout_faults(
    found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec], where: str
) -> list[Fault]:
    """Every tensor that is missing, extra, mis-shaped or of another dtype: vLLM loads them all
    silently.
    """
    other = "is this the checkpoint that config.json describes?"
    faults = [
        Fault(where, f"tensor {name} is missing", other)
        for name in expected
        if name not in found and name not in OPTIONAL
    ]
    for name, spec in found.items():
        if name not in expected:
            if name not in OPTIONAL:
                faults.append(
                    Fault(where, f"tensor {name} is not part of this architecture", other)
                )
        elif spec != expected[name]:
            want = expected[name]
            faults.append(
                Fault(
                    where,
                    f"tensor {name} is {spec.dtype} {list(spec.shape)}, not {want.dtype} {list(want.shape)}",
                    other,
                )
            )
    return faults


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity.

    By its extremes, which carry a NaN along: on BF16 and a CPU 14 times as fast as
    `torch.isfinite`.
    """
    return tensor.numel() == 0 or all(
        bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)
    )


def in_threads(
    work: Callable[[str], Result], names: Iterable[str], most: int = THREADS
) -> Iterator[Result]:
    """Results of `work` in the order of `names`; torch and the file system leave the interpreter
    free meanwhile.
    """
    with ThreadPoolExecutor(min(most, os.cpu_count() or 1)) as threads:
        yield from threads.map(work, names)


def nonfinite_faults(tensors: TensorFiles) -> list[Fault]:
    """Every tensor that holds NaN or infinity. Reads all weights once, a few tensors at a time."""

    def check(name: str) -> list[Fault]:
        tensor = tensors.read(name)
        if not tensor.is_floating_point() or all_finite(tensor):
            return []
        bad = int((~torch.isfinite(tensor)).sum())
        remedy = "the checkpoint is broken: train or copy again"
        return [Fault(name, f"holds {bad} NaN or infinite values", remedy)]

    names = tqdm(tensors, desc="reading weights", unit="tensor", leave=False, disable=None)
    return [fault for faults in in_threads(check, names) for fault in faults]


def check_weights(config: CheckpointConfig, finite: bool = True) -> TensorFiles:
    """Open the weights of a BF16 checkpoint and hold them against its config.

    Args:
        config: The checkpoint's configuration.
        finite: Also read every weight and refuse NaN and infinity.

    Raises:
        BadInput: With every fault found.
    """
    tensors = TensorFiles(config.directory)
    faults = layout_faults(tensors.specs, expected_tensors(config), str(config.directory))
    if finite and not faults:
        faults = nonfinite_faults(tensors)
    raise_if_any(faults)
    return tensors
