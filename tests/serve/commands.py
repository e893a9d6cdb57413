"""Runs the commands of serve in tests, from whatever directory pytest was started in."""

import subprocess
import sys
from pathlib import Path

import serve

ROOMS = Path(serve.__file__).parents[1]
"""The directory that holds the rooms: `python -m` finds them there."""


def run_module(module: str, *arguments: object, timeout: float | None = None):
    """Run `python -m MODULE ARGUMENTS` and return the finished process."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOMS, timeout=timeout)
