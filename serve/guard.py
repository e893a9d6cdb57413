"""Runs a server and sees to it that nothing of it outlives whoever started it. Started by
serve.process, not by hand.

    python guard.py LIFELINE_FD GRACE_SECONDS COMMAND…

vLLM is a tree: the API server, EngineCore, one worker a GPU. When its parent is killed with
SIGKILL, nobody tells it, and the tree goes on holding the GPU. So this process stands between: it
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
import time

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux for SIGKILL when the guard itself is killed; elsewhere nothing of the kind exists."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_group(group: int) -> None:
    """SIGKILL to whatever is left of a process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def run(lifeline: int, grace: float, command: list[str]) -> int:
    """Run `command` until it ends or the lifeline closes, and return its exit status.

    Args:
        lifeline: Reading end of the pipe; the end of file means the parent is gone, or wants the
            server stopped.
        grace: Seconds between SIGTERM and SIGKILL.
        command: The server's command line.
    """
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, frame: asked.append(received))
    child = subprocess.Popen(command, process_group=0, preexec_fn=die_with_parent)
    try:
        while child.poll() is None and not asked:
            # Without a byte to read it wakes five times a second to look at the child.
            if select.select([lifeline], [], [], 0.2)[0] and not os.read(lifeline, 1):
                break
        if child.poll() is None:
            child.terminate()
            deadline = time.monotonic() + grace
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
    finally:
        # The API server may be gone and its EngineCore not: they share the group.
        kill_group(child.pid)
    return child.wait()


if __name__ == "__main__":
    status = run(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
    sys.exit(status if status >= 0 else 128 - status)
