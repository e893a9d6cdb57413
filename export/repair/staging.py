"""A copy of a directory to repair, whose unchanged files are the same files by hard links."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged_copy(directory: Path) -> Iterator[Path]:
    """Yield a neighbour of a directory that holds its files by hard links.

    Replace files in it, never write into them: they are the directory's. It is removed at the end,
    unless `exchange` has put it into the directory's place.

    Args:
        directory: An absolute path.
    """
    copy = directory.with_name(f".{directory.name}.repair")
    shutil.rmtree(copy, ignore_errors=True)
    try:
        shutil.copytree(directory, copy, symlinks=True, copy_function=_link)
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def exchange(copy: Path, directory: Path) -> None:
    """Put a finished copy into a directory's place.

    A kill between the two renames leaves the old one under another name; `restore_interrupted`
    brings it back.
    """
    before = _before(directory)
    os.rename(directory, before)
    try:
        os.rename(copy, directory)
    except BaseException:
        os.rename(before, directory)
        raise
    shutil.rmtree(before)


def restore_interrupted(directory: Path) -> None:
    """Undo or finish an exchange that was killed."""
    before = _before(directory)
    if not before.exists():
        return
    if directory.exists():
        shutil.rmtree(before)
    else:
        os.rename(before, directory)


def _before(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.before-repair")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)
