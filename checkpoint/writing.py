"""Writes a directory beside its target and renames it last, so that the target is whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def finished_directory(target: Path) -> Iterator[Path]:
    """Yield an empty neighbour of `target` to write into; rename it to `target` at the end, remove it on an error.

    A neighbour left by a killed run is removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors writes files that only their owner can read
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
