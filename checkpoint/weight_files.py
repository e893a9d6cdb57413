"""Which files hold a checkpoint's weights, and whether their sizes are those of their headers.

Does not import torch, so a server and the first checks of a run can use it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint.config import bf16_faults, read_config, read_json
from checkpoint.faults import BadInput, Fault, raise_if_any, shortened
from checkpoint.other_weights import INDEX, SINGLE, no_weights
from checkpoint.reading import checkpoint_file_fault, is_lfs_pointer, safetensors_header


def weight_faults(directory: Path) -> list[Fault]:
    """Return faults of the weights, from the files' headers: none there, a missing shard, a
    truncated file.
    """
    try:
        files = set(read_weight_map(directory).values()) or {SINGLE}
    except BadInput as bad:
        return list(bad.faults)
    faults: list[Fault] = []
    for name in sorted(files):
        faults += file_faults(directory / name, directory)
    return faults


def checkpoint_faults(directory: Path, must_be_bf16: bool = False) -> list[Fault]:
    """Return faults of a checkpoint that are told in a moment: those of config.json, or where there
    are none, those of the weights' headers.

    Args:
        directory: A checkpoint.
        must_be_bf16: Whether a quantized one is a fault.
    """
    try:
        config = read_config(directory)
    except BadInput as bad:
        return list(bad.faults)
    faults = list(bf16_faults(config)) if must_be_bf16 else []
    return [*faults, *weight_faults(directory)]


def read_weight_map(directory: Path) -> dict[str, str]:
    """Return the file name of each tensor by the index; empty for a single file.

    Raises:
        BadInput: There are no weights, or the index is damaged.
    """
    path = directory / INDEX
    if path.exists():
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadInput(Fault(str(path), "has no weight_map", "copy the file again"))
        raise_if_any(_file_name_faults(weight_map, path))
        return weight_map
    if not (directory / SINGLE).exists():
        raise BadInput(no_weights(directory))
    return {}


def _file_name_faults(weight_map: Mapping[str, Any], path: Path) -> Iterator[Fault]:
    """Yield the entries of an index that do not name a safetensors file of its directory.

    vLLM looks for the files of the directory, so that one elsewhere would not be the one it loads.
    """
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            what = f"weight_map.{shortened(name, 120)} is not a file name"
            yield Fault(str(path), what, "copy the file again")
        elif "/" in file or "\\" in file or file.startswith(".") or not file.isprintable():
            what = f"weight_map.{shortened(name, 120)} is {shortened(repr(file), 80)}, not the name"
            yield Fault(str(path), f"{what} of a file beside it", "copy the file again")
        elif not file.endswith(".safetensors"):
            what = f"weight_map.{shortened(name, 120)} is {shortened(repr(file), 80)}, which vLLM"
            yield Fault(str(path), f"{what} does not load", "copy the file again")


def file_faults(path: Path, directory: Path) -> Iterator[Fault]:
    """Yield the fault of one weight file, from its header and its size.

    Args:
        path: The file.
        directory: The checkpoint that it belongs to.
    """
    # vLLM finds this out after it has loaded the shards before it, and names neither the file nor
    # the reason.
    fault = checkpoint_file_fault(path, directory)
    if fault is not None and path.exists():
        yield fault
        return
    try:
        if is_lfs_pointer(path):
            yield Fault(str(path), "is only a Git LFS pointer", "fetch it: git lfs pull")
            return
        expected = _expected_bytes(path)
        size = path.stat().st_size
    except FileNotFoundError:
        yield Fault(str(path), "no such file, though the index names it", "copy the shard")
        return
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"is not a safetensors file: {shortened(error)}"
        yield Fault(str(path), what, "copy the file again")
        return
    if size != expected:
        what = f"is truncated: it has {size} bytes, and by its header {expected}"
        yield Fault(str(path), what, "copy the file again")


def _expected_bytes(path: Path) -> int:
    """The size that a safetensors file has by its header."""
    header, header_length = safetensors_header(path)
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            end = max(end, entry["data_offsets"][1])
    return 8 + header_length + end
