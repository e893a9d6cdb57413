"""Several processes under torchrun, each with a GPU and a share of the samples; alone, everything
here does nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def together(device: str) -> Iterator[None]:
    """Join the other processes: NCCL between GPUs, gloo between CPUs. ModelOpt then shares every
    range it finds.
    """
    if RANKS == 1:
        yield
        return
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def firsts(value: bool) -> bool:
    """What the first process says."""
    said = [value]
    if RANKS > 1:
        torch.distributed.broadcast_object_list(said, src=0)
    return said[0]


def wait() -> None:
    """Wait until every process has come here."""
    if RANKS > 1:
        torch.distributed.barrier()
