"""Several processes under torchrun or `accelerate launch`, each with a share of the samples."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        index: Number of this process, from 0.
        count: Number of processes.
    """

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and measures."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier()

    def from_first(self, value: bool) -> bool:
        """Return the first process's value on every process."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


ALONE = Processes()


@contextlib.contextmanager
def joined_processes(device: str) -> Iterator[Processes]:
    """Join the other processes of the launcher, if there is one: NCCL on GPUs, gloo on CPUs.

    ModelOpt then takes the maximum of every activation range over all processes.

    Args:
        device: The torch device of this process.
    """
    if launched_processes() == 1:
        yield ALONE
        return
    import torch.distributed as dist
    from accelerate import PartialState

    state = PartialState(cpu=not device.startswith("cuda"))
    try:
        yield Processes(state.process_index, state.num_processes)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def launched_processes() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_gpu() -> int | None:
    """Number of the GPU that the launcher gave to this process; None without a launcher."""
    rank = os.environ.get("LOCAL_RANK")
    return None if rank is None else int(rank)
