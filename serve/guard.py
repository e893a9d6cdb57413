"""Runs a server so that nothing of it outlives the process that started it.

Started by serve.process, not by hand:

    python guard.py LIFELINE_FD GRACE_SECONDS COMMAND…

vLLM is a tree of processes: the API server, EngineCore, one worker per GPU. When its parent is
killed with SIGKILL, the tree is not told and keeps the GPU. So this process stands between: it
holds the reading end of a pipe whose writing end only the parent has. However the parent ends, the
pipe closes, and the guard stops the tree: SIGTERM to the API server, and after the grace period
SIGKILL to its whole process group. It imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Make Linux kill this process when its parent ends; elsewhere there is no such call."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_group(group: int) -> None:
    """Send SIGKILL to whatever is left of a process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def run(lifeline: int, grace: float, command: list[str]) -> int:
    """Run `command` until it ends or the lifeline closes, and return its exit status.

    Args:
        lifeline: Reading end of the pipe; the end of file means that the parent is gone, or wants
            the server stopped.
        grace: Seconds between SIGTERM and SIGKILL.
        command: The server's command line.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    child = subprocess.Popen(command, process_group=0, preexec_fn=die_with_parent)
    try:
        while child.poll() is None and not received and not is_closed(lifeline):
            pass
        if child.poll() is None:
            child.terminate()
            wait(child, grace)
    finally:
        # The API server may be gone and its EngineCore not: they share the group.
        kill_group(child.pid)
    return child.wait()


def is_closed(lifeline: int) -> bool:
    """Wait up to 0.2 s for the writing end of the pipe to close; return whether it did."""
    readable, _, _ = select.select([lifeline], [], [], 0.2)
    return bool(readable) and not os.read(lifeline, 1)


def wait(child: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait until a process ends, at most for so long."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(seconds)


def exit_status(status: int) -> int:
    """Return a process's exit status as a shell gives it: 128 + N after signal N."""
    if status < 0:
        return 128 - status
    return status


if __name__ == "__main__":
    sys.exit(exit_status(run(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])))
