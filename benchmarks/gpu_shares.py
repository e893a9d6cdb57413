"""Divides a GPU between several servers of the 12B: what each needs, and which fit together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from checkpoint.config import CheckpointConfig
from serve.command import batched_tokens
from serve.environment import Device
from serve.memory import GB, Cache, cache_of, plan_memory
from serve.settings import ServeSettings

WEIGHTS = {"bf16": 26.36 * GB, "fp8": 15.40 * GB, "nvfp4": 10.60 * GB}
"""Bytes of an export of the 12B by format (benchmarks/results/ptq_fp8_12b_h100.json and
ptq_nvfp4_12b_h100.json). Directories without weights do not have them."""

GRAPHS = 1.0 * GB
"""CUDA graphs and what PyTorch's allocator holds beside the activations. An estimate."""

USABLE = 0.97
"""Share of a GPU's memory that servers get together."""

SPARE = 1.15
"""Factor on a cache: blocks of requests that have just ended, or that prefix caching keeps."""


@dataclass(frozen=True)
class Load:
    """What a server is asked at once.

    Attributes:
        requests: Their number.
        tokens: Of each, prompt and answer.
    """

    requests: int
    tokens: int

    def cache_bytes(self, cache: Cache) -> int:
        """Return the bytes of cache that all requests take."""
        blocks = math.ceil(self.tokens / cache.block_tokens) + cache.state_blocks
        return int(SPARE * self.requests * blocks * cache.block_bytes)


def cache_bytes(config: CheckpointConfig, loads: Iterable[Load]) -> int:
    """Return the bytes of cache that a server needs for each of several loads, one after another.

    One sequence of the model's full length always fits: vLLM does not start otherwise.
    """
    cache = cache_of(config)
    needed = [Load(1, config.max_length), *loads]
    return max(load.cache_bytes(cache) for load in needed)


def server_bytes(
    config: CheckpointConfig, format: str, settings: ServeSettings, device: Device, pool: int
) -> float:
    """Return the bytes that a server takes of a GPU.

    Args:
        config: The 12B's.
        format: One of `WEIGHTS`.
        settings: How clips are seen.
        device: The GPU.
        pool: Bytes of its cache.
    """
    step_tokens = batched_tokens(config, settings)
    memory = plan_memory(config, device, step_tokens, settings.video.max_frames)
    return WEIGHTS[format] + memory.step + GRAPHS + pool


def memory_flags(device: Device, size: float, pool: int) -> list[str]:
    """Return the flags of a server that shares a GPU; none on a CPU.

    The size of the cache is given, because servers that start at once count each other's memory as
    their own while they look for what is left.

    Args:
        device: The GPU.
        size: Bytes that the server takes.
        pool: Bytes of its cache.
    """
    if device.kind != "cuda" or not device.memory:
        return []
    share = min(size / device.memory, 0.95)
    flags = ["--gpu-memory-utilization", f"{share:.2f}"]
    return [*flags, "--kv-cache-memory-bytes", str(pool)]


def stages(
    groups: Sequence[Sequence[str]], sizes: Mapping[str, float], room: float
) -> list[list[int]]:
    """Divide groups of servers into stages whose servers fit together.

    Args:
        groups: Names of the servers that are compared, in the order in which they are measured.
        sizes: Bytes of each server.
        room: Bytes for all servers of a stage; 0 puts each group into a stage of its own.

    Returns:
        Indices of `groups` by stage, in order.
    """
    found: list[list[int]] = []
    running: set[str] = set()
    for index, group in enumerate(groups):
        together = running | set(group)
        if found and sum(sizes[name] for name in together) <= room:
            found[-1].append(index)
            running = together
            continue
        found.append([index])
        running = set(group)
    return found
