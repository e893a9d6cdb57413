"""Writes down when the steps of a request begin and end, to find out where its time goes.

HYBRIDQUANT_STEP_TIMES names a file. While that file exists, each step appends a line to it, a JSON
object with `step`, and `begin` and `end` in seconds of the machine's monotonic clock, which all
processes share. Steps on a GPU are waited for, which costs some of what runs ahead of the GPU
otherwise; remove the file, and nothing is waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator

VARIABLE = "HYBRIDQUANT_STEP_TIMES"


@contextlib.contextmanager
def timed(step: str, on_device: bool = False) -> Iterator[None]:
    """Write down how long a `with` block takes, if that is asked for.

    Args:
        step: Name of the step.
        on_device: Whether the block starts work on a GPU, whose end is then waited for.
    """
    path = os.environ.get(VARIABLE)
    if not path or not os.path.isfile(path):
        yield
        return
    if on_device:
        _wait_for_device()
    begin = time.monotonic()
    yield
    if on_device:
        _wait_for_device()
    line = json.dumps({"step": step, "begin": begin, "end": time.monotonic()})
    # One write of a short line at the end of a file is whole, whoever else writes.
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
