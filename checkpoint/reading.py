"""Which files are read at all, and small ones read within bounded time and memory.

A checkpoint comes from elsewhere. A named pipe in it would block a run for ever, a device would
fill the memory, and a link out of the directory would read what belongs to somebody else.

Does not import torch, so the serve environment can use it.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoint.faults import BadInput, Fault, shortened

LARGEST_TEXT = 256 * 2**20
"""Bytes of a JSON file or a template at most. The largest in use are tokenizers, of 35 MB."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

DEEPEST = 100
"""Levels of nesting of a JSON file at most. Configs have five."""

_LARGEST_INTEGER = 2**63 - 1

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

_LFS = b"version https://git-lfs"
_COPY = "copy the file again"


def regular_file_fault(path: Path) -> Fault | None:
    """Return the fault of a path that is not an existing file, a link to one included, or that the
    user may not read.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return Fault(str(path), "no such file", "check the path")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return Fault(shortened(path), f"cannot be read: {reason}", "check the path")
    if stat.S_ISREG(mode):
        if not os.access(path, os.R_OK):
            what = f"cannot be read: {os.strerror(errno.EACCES)}"
            return Fault(str(path), what, "change its permissions")
        return None
    kind = _KINDS.get(stat.S_IFMT(mode), "something else")
    return Fault(str(path), f"is {kind}, not a file", "give a file")


def checkpoint_file_fault(path: Path, root: Path) -> Fault | None:
    """Return the fault of a file of a checkpoint that must not be read.

    Args:
        path: The file.
        root: The checkpoint's directory. Links must stay inside; those of a snapshot in a cache of
            the Hugging Face Hub may lead to the blobs beside it.
    """
    fault = regular_file_fault(path)
    if fault is not None:
        return fault
    base = root.resolve()
    target = path.resolve()
    if target.is_relative_to(base) or _is_hub_blob(path, base):
        return None
    what = f"is a link out of the checkpoint, to {shortened(target)}"
    return Fault(str(path), what, "put the file itself there")


def _is_hub_blob(path: Path, base: Path) -> bool:
    """Whether a file of `models--ORG--NAME/snapshots/REVISION` links to `models--ORG--NAME/blobs`.

    Only the first link is followed: blobs may themselves lie on another disk.
    """
    if base.parent.name != "snapshots" or not path.is_symlink():
        return False
    linked = os.path.normpath(path.parent.resolve() / os.readlink(path))
    return Path(linked).is_relative_to(base.parent.parent / "blobs")


def hub_revision(directory: Path) -> str | None:
    """Return the revision of a snapshot in a cache of the Hugging Face Hub; None elsewhere."""
    base = directory.resolve()
    return base.name if base.parent.name == "snapshots" else None


def read_small_file(path: Path, root: Path | None = None) -> bytes:
    """Read a JSON file, a template or a Python file of a checkpoint.

    Args:
        path: The file.
        root: The checkpoint's directory; by default the file's own.

    Raises:
        BadInput: It does not exist, is not a file of the checkpoint, is too large, empty, or only
            the pointer that Git LFS leaves.
    """
    fault = checkpoint_file_fault(path, root or path.parent)
    if fault is not None:
        raise BadInput(fault)
    try:
        size = path.stat().st_size
        if size > LARGEST_TEXT:
            what = f"has {size / 1e6:,.0f} MB, at most {LARGEST_TEXT / 1e6:,.0f} MB are read"
            raise BadInput(Fault(str(path), what, _COPY))
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(Fault(str(path), f"cannot be read: {error.strerror}", _COPY)) from None
    if not data.strip():
        raise BadInput(Fault(str(path), "is empty", _COPY))
    if data.startswith(_LFS):
        raise BadInput(Fault(str(path), "is only a Git LFS pointer", "fetch it: git lfs pull"))
    return data


def deep_pixels_fault(mode: str, where: str) -> Fault | None:
    """Return the fault of a picture that a server clips to white, or None.

    Args:
        mode: Pillow's name of the kind of pixels.
        where: Names the picture.
    """
    if mode not in ("I", "F") and not mode.startswith("I;"):
        return None
    what = f"pixels have more than 8 bits (mode {mode}), and turn white when served"
    return Fault(where, what, "scale them to 8 bits a channel")


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is only the pointer that Git LFS leaves where it fetched nothing."""
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def tokenizer_faults(directory: Path) -> Iterator[Fault]:
    """Yield faults of a tokenizer's files that are there: empty, cut, or not fetched by Git LFS."""
    for name in TOKENIZER_FILES:
        path = directory / name
        if not path.exists():
            continue
        try:
            json.loads(read_small_file(path, directory))
        except BadInput as bad:
            yield from bad.faults
        except (ValueError, RecursionError) as error:
            yield Fault(str(path), f"cannot be read as JSON: {shortened(error)}", _COPY)


def parse_json(data: bytes, path: Path) -> Any:
    """Parse the content of a JSON file.

    Raises:
        BadInput: It is not JSON in UTF-8, is nested too deeply, or contains an integer of more than
            64 bits.
    """
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        what = f"is nested more than {DEEPEST} levels deep"
        raise BadInput(Fault(str(path), what, _COPY)) from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        what = f"cannot be read as JSON: {shortened(error)}"
        raise BadInput(Fault(str(path), what, _COPY)) from None
    for fault in _extreme_faults(value, path):
        raise BadInput(fault)
    return value


def json_kind(value: object) -> str:
    """Return what JSON calls a value: list, string, number, true, false or null."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "list" if isinstance(value, list) else "object"


def _extreme_faults(value: Any, path: Path) -> Iterator[Fault]:
    """Yield what other code could not handle: it recurses, and computes with 64 bits."""
    waiting = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if depth > DEEPEST:
            yield Fault(str(path), f"is nested more than {DEEPEST} levels deep", _COPY)
            return
        if isinstance(item, dict):
            waiting += [(part, depth + 1) for part in item.values()]
        elif isinstance(item, list):
            waiting += [(part, depth + 1) for part in item]
        elif isinstance(item, int) and abs(item) > _LARGEST_INTEGER:
            yield Fault(str(path), "contains an integer of more than 64 bits", _COPY)
            return


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file without torch.

    Args:
        path: The file.

    Returns:
        Its entries, of tensors and `__metadata__`, and the header's length in bytes.

    Raises:
        OSError, ValueError, struct.error: It is not a safetensors file.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"a header of {length} bytes does not fit into it")
        return json.loads(file.read(length)), length
