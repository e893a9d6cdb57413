"""Writes a directory beside its target and renames it last, so that the target is whole or not
there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from checkpoint.faults import BadInput, Fault


def check_output(output: Path, needed: int) -> None:
    """Refuse an output that exists, cannot be written, or whose disk is too small.

    Args:
        output: The directory to be written.
        needed: Bytes of weights to come.

    Raises:
        BadInput: With what to do.
    """
    if output.exists():
        raise BadInput(Fault(str(output), "exists already", "remove it, or give another output"))
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise BadInput(Fault(str(existing), "is a file, not a directory", "give another output"))
    free = shutil.disk_usage(existing).free
    if free < needed * 1.01 + 2**20:
        what = f"needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise BadInput(
            Fault(str(output), what, "free some space, or give an output on another disk")
        )


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: When the disk is full or the file cannot be written. safetensors reports both as a
            `SafetensorError` whose text holds the system's error number.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


@contextlib.contextmanager
def finished_directory(target: Path) -> Iterator[Path]:
    """Yield an empty neighbour of `target` to write into; rename it to `target` at the end, remove
    it on an error.

    A neighbour left by a killed run is removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        publish(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def publish(partial: Path, target: Path) -> None:
    """Bring all files of a finished directory onto the disk and rename it to `target`."""
    for file in partial.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    os.rename(partial, target)
