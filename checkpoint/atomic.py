"""Writes files and directories beside their target and renames them last: a target is whole or
absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.faults import BadInput, Fault, shortened

if TYPE_CHECKING:
    import torch

_SPARE = 2**20
"""Bytes left for directories and small files when space is checked."""

_PROBE = 2**16
"""Bytes written to find out whether a folder takes files."""


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary neighbour to write; at the end it is renamed to `path`.

    The neighbour is on the disk before it is renamed. It is removed when the body raises.

    Raises:
        OSError: With `path` as its file name where the system names none, as for a full disk.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.chmod(0o644)  # safetensors writes files that only their owner can read
        flush(partial)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8."""
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented by two spaces."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Args:
        path: The file.
        tensors: By name, contiguous and on the CPU.
        metadata: Text for the header; `{"format": "pt"}` when None, as transformers expects.

    Raises:
        OSError: The disk is full or the file cannot be written. safetensors reports both as a
            `SafetensorError` whose text contains the system's error number.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replaced_file(path) as partial:
        try:
            save_file(dict(tensors), partial, metadata=dict(metadata or {"format": "pt"}))
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(path)) from None


@contextlib.contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Yield an empty neighbour of `target` to write into; at the end it is renamed to `target`.

    A neighbour that a killed run left is removed first. It is removed when the body raises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        rename_directory(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def rename_directory(finished: Path, target: Path) -> None:
    """Flush all files of a finished directory to the disk and rename it to `target`."""
    flush(finished)
    os.rename(finished, target)


def remove_directory(directory: Path) -> None:
    """Remove a directory so that a kill leaves it whole or gone."""
    removed = directory.with_name(f"{directory.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    if directory.exists():
        directory.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file, or all files of a directory, to the disk."""
    files = [path] if path.is_file() else path.rglob("*")
    for file in files:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def directory_bytes(directory: Path) -> int:
    """Bytes of all files in a directory; 0 if there is none."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that `path` is on, or will be on."""
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    return shutil.disk_usage(existing).free


def space_faults(path: Path, needed: int, purpose: str) -> Iterator[Fault]:
    """Yield a fault when the disk of `path` has less than `needed` bytes free.

    Args:
        path: The file or directory that will be written; what it already holds counts as free.
        needed: Bytes to be written.
        purpose: What the bytes are for, for the message.
    """
    free = free_bytes(path) + directory_bytes(path)
    if free < needed * 1.01 + _SPARE:
        what = f"needs {needed / 1e9:.2f} GB{purpose}, {free / 1e9:.2f} GB are free"
        yield Fault(str(path), what, "free some space, or give an output on another disk")


def output_faults(output: Path) -> Iterator[Fault]:
    """Yield a fault when an output directory exists or its parent is not a directory."""
    if output.exists() or output.is_symlink():
        yield Fault(str(output), "exists already", "remove it, or give another output")
        return
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    if not existing.is_dir():
        yield Fault(str(existing), "is a file, not a directory", "give another output")


def check_writable(folder: Path) -> None:
    """Make a folder where there is none, and check that files can be written there.

    Raises:
        BadInput: It cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE))  # a full disk still makes empty files
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise BadInput(Fault(shortened(folder), what, "give another one")) from None


def check_result_file(file: Path) -> None:
    """Check that a file of results can be written, before they are measured for minutes.

    Its folder is made where there is none. A file of results that is there already will be
    replaced, but no file of a checkpoint.

    Raises:
        BadInput: It cannot be written.
    """
    where = shortened(file)
    try:
        if file.is_dir():
            raise BadInput(Fault(where, "is a directory", "give a file"))
        if file.exists() and not file.is_file():
            raise BadInput(Fault(where, "is not a regular file", "give another one"))
        if file.exists() and (file.parent / "config.json").exists():
            raise BadInput(Fault(where, "is a file of a checkpoint", "give another one"))
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise BadInput(Fault(where, what, "give another one")) from None
    check_writable(file.absolute().parent)


def check_output(output: Path, needed: int) -> None:
    """Refuse an output that exists, cannot be written, or whose disk is too small.

    Args:
        output: The directory to be written.
        needed: Bytes to be written.

    Raises:
        BadInput: With what to do.
    """
    faults = list(output_faults(output)) or list(space_faults(output, needed, ""))
    if faults:
        raise BadInput(*faults)
