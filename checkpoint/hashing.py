"""Reads a weight file once, from its first byte to its last: the SHA-256 of the whole, and every
tensor in parts of bounded size.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from checkpoint.faults import Fault, raise_if_any
from checkpoint.files import DTYPES, TensorFiles, all_finite, bytes_of, in_threads, read_into

PART_BYTES = 16 * 2**20
"""Bytes of a tensor in memory at once, per thread."""


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a tensor.

    Attributes:
        name: The tensor's.
        start: Index of the first row.
        rows: The rows as they are in the file; of a scalar, the scalar. Valid until the next part
            is asked for.
    """

    name: str
    start: int
    rows: torch.Tensor


Parts = Iterator[Part]
"""All parts of one tensor, in order."""


def visit_file(tensors: TensorFiles, file: str, visit: Callable[[str, Parts], None]) -> str:
    """Read a file once and hand every tensor to `visit`, in the order of the file.

    Args:
        tensors: The files of the directory.
        file: Name of one of them.
        visit: Called with the name of a tensor and its parts; it may leave parts unread.

    Returns:
        The file's SHA-256.

    Raises:
        OSError: The file is gone or has become shorter.
    """
    digest = hashlib.sha256()
    parts = _parts(tensors, file, digest)
    for name, own in itertools.groupby(parts, key=lambda part: part.name):
        visit(name, own)
    return digest.hexdigest()


def _parts(tensors: TensorFiles, file: str, digest: Any) -> Parts:
    path = tensors.directory / file
    buffer = torch.empty(PART_BYTES, dtype=torch.uint8)
    with path.open("rb", buffering=0) as opened:
        descriptor = opened.fileno()
        position = tensors.header_bytes(file)
        for start in range(0, position, PART_BYTES):
            header = buffer[: min(PART_BYTES, position - start)]
            read_into(descriptor, header, start, path)
            digest.update(bytes_of(header))
        for name in tensors.in_file(file):
            spec = tensors.stored[name]
            if not spec.nbytes:
                continue
            count = spec.shape[0] if spec.shape else 1
            row_bytes = spec.nbytes // count
            step = max(1, PART_BYTES // row_bytes)
            for start in range(0, count, step):
                rows = min(step, count - start)
                nbytes = rows * row_bytes
                # Only a single row can be larger than the buffer.
                memory = buffer if nbytes <= PART_BYTES else torch.empty(nbytes, dtype=torch.uint8)
                data = memory[:nbytes]
                read_into(descriptor, data, position, path)
                digest.update(bytes_of(data))
                position += nbytes
                shape = (rows, *spec.shape[1:]) if spec.shape else ()
                yield Part(name, start, data.view(DTYPES[spec.dtype]).reshape(shape))


def digests_of_finite(tensors: TensorFiles) -> dict[str, str]:
    """Read all weights once; return the SHA-256 of each file.

    Raises:
        BadInput: With every tensor that contains NaN, infinity, or values that BF16 cannot hold
            where the tensor is rounded to it.
    """
    faults: list[Fault] = []
    rounded = set(tensors.rounded)

    def check(name: str, parts: Parts) -> None:
        broken = 0
        too_large = 0
        for part in parts:
            if not part.rows.is_floating_point():
                continue
            if not all_finite(part.rows):
                broken += int((~torch.isfinite(part.rows)).sum())
            if name in rounded:
                values = part.rows.to(torch.bfloat16)
                if not all_finite(values):
                    too_large += int((~torch.isfinite(values)).sum())
        if broken:
            what = f"contains {broken} NaN or infinite values"
            faults.append(Fault(name, what, "the checkpoint is broken: train or copy it again"))
        elif too_large:
            what = f"contains {too_large} values that are infinite in BF16"
            faults.append(Fault(name, what, "BF16 ends at 3.39e38: train or copy it again"))

    files = tensors.files
    digests = in_threads(lambda file: visit_file(tensors, file, check), files)
    found = dict(zip(files, digests, strict=True))
    raise_if_any(sorted(faults, key=lambda fault: fault.where))
    return found
