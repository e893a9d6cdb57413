"""Several processes under torchrun or `accelerate launch`, each with a share of the samples."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from checkpoint.faults import FIRST_SPEAKS_SECONDS, BadInput, Fault

_LOST = ("closed by peer", "reset by peer")
"""What gloo's errors say when another process has ended."""

_OTHER_SPEAKS_SECONDS = 2 * FIRST_SPEAKS_SECONDS
"""The launcher ends all processes with the first that ends: the other's message comes before."""


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

    Raises:
        BadInput: The body was waiting for a process that has ended, with a message of its own. Over
            gloo the others are told so; over NCCL they wait until the launcher ends them.
    """
    if launched_processes() == 1:
        yield ALONE
        return
    import torch.distributed as dist
    from accelerate import PartialState

    state = PartialState(cpu=not device.startswith("cuda"))
    try:
        yield Processes(state.process_index, state.num_processes)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _LOST):
            raise
        time.sleep(_OTHER_SPEAKS_SECONDS)
        where = f"process {state.process_index} of {state.num_processes}"
        what = "has lost another process of the run"
        raise BadInput(Fault(where, what, "the other one's message says why")) from None
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
