"""How much memory is available: on the host with the limits that a container sets, and on a GPU."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoint.faults import BadInput, Fault, shortened

# The last is Python's message when there is no memory for a thread's stack.
_EXHAUSTED = re.compile(
    "can't allocate memory|out of memory|Cannot allocate memory|can't start new thread"
)
_ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
_CGROUP = Path("/sys/fs/cgroup")


def host_available() -> int:
    """Bytes of host memory that can be used, by the system's estimate and the cgroup's limit."""
    available = _meminfo("MemAvailable")
    # Only the group's own limit: inside a container, a limit further up shows as the root group's.
    limit = _read_number(_CGROUP / "memory.max")
    used = _read_number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        available = min(available, limit - used + _memory_stat("inactive_file"))
    return max(available, 0)


def device_available(device: str) -> int:
    """Bytes of memory that can still be used on a torch device, the CPU included."""
    if device.startswith("cuda"):
        import torch  # a recipe is read without it

        return int(torch.cuda.mem_get_info(device)[0])
    return host_available()


def let_segments_grow() -> None:
    """Let torch's allocator of GPU memory extend its segments, unless the user configures it.

    The rows of a training differ in shape, and memory is lost between blocks of fixed segments: 6
    GB of 49 were measured, and 1.6 of 45 this way
    (benchmarks/results/training_attention_h200.json).
    Call it before torch is imported, which reads the variable once.
    """
    if not _ALLOCATOR_VARIABLES & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host or a GPU has no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    return isinstance(error, RuntimeError) and _EXHAUSTED.search(str(error)) is not None


@contextlib.contextmanager
def memory_advice(where: Callable[[], str], remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error into a fault.

    Args:
        where: Describes what ran out of memory, and how far it had come.
        remedy: What to do about it.

    Raises:
        BadInput: The body ran out of memory, on the host or on a GPU.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has a class of its own for GPUs only
        if not is_out_of_memory(error):
            raise
        details = shortened(error) or "no details"
        raise BadInput(Fault("memory", f"{where()}: {details}", remedy)) from None


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/meminfo has no {field}")


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _memory_stat(field: str) -> int:
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        values = dict(line.split() for line in lines)
    except (OSError, ValueError):
        return 0
    return int(values.get(field, 0))
