"""How much memory there is to use: on the host with the limits that a container sets, and on a GPU."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from checkpoint.faults import BadInput, Fault

# The last is Python's, when there is no room for a thread's stack.
_EXHAUSTED = re.compile(
    "can't allocate memory|out of memory|Cannot allocate memory|can't start new thread"
)
_CGROUP = Path("/sys/fs/cgroup")


def host_available() -> int:
    """Bytes of host memory that can still be used, by the system's own estimate and the cgroup's
    limit.
    """
    available = _meminfo("MemAvailable")
    # Only the group's own limit: a limit further up shows inside a container as the root group's.
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        available = min(available, limit - used + _stat("inactive_file"))
    return max(available, 0)


def device_available(device: str) -> int:
    """Bytes of memory that can still be used on a torch device, the CPU included."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return host_available()


@contextlib.contextmanager
def memory_advice(where: Callable[[], str], remedy: str) -> Iterator[None]:
    """Turn memory that does not suffice into a fault.

    Args:
        where: Says what ran out of memory, and how far it had come.
        remedy: What to do about it.

    Raises:
        BadInput: When the body runs out of memory, on the host or on a GPU.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has a class of its own for GPUs only
        text = " ".join(str(error).split())
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not _EXHAUSTED.search(
            text
        ):
            raise
        raise BadInput(
            Fault("memory", f"{where()}: {text[:200] or 'no details'}", remedy)
        ) from None


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/meminfo has no {field}")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _stat(field: str) -> int:
    try:
        pairs = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(pairs.get(field, 0))
