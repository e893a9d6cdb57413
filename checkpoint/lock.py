"""A lock on a directory that one process at a time may write to; a kill releases it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from checkpoint.faults import BadInput, Fault, shortened

LOCK = "lock"
"""Name of the file in the directory. Its text says who wrote it last."""


@contextlib.contextmanager
def locked_directory(directory: Path) -> Iterator[None]:
    """Hold the lock of an existing directory for the length of a `with` block.

    Raises:
        BadInput: Another process holds it; the fault says which.
    """
    path = directory / LOCK
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(_held(directory)) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def lock_faults(directory: Path) -> Iterator[Fault]:
    """Yield a fault if another process holds the lock of a directory, which need not exist."""
    path = directory / LOCK
    if not path.is_file():
        return
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield _held(directory)


def _held(directory: Path) -> Fault:
    holder = shortened((directory / LOCK).read_text(encoding="utf-8", errors="replace"))
    what = f"another run is working here: {holder or 'a process'}"
    return Fault(str(directory), what, "wait for it to end, or stop it")
