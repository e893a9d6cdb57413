"""Runs a training step as one CUDA graph for every shape of batch: a small model otherwise waits
for kernel launches.

On an H100 a step of the tiny checkpoint is 13 ms of kernels in 100 ms of launches. Forward,
backward and optimizers are captured together, after one step without a graph has compiled and tuned
everything that the shape needs.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tiny.training.data import Batch

Step = Callable[[Batch, float], tuple[torch.Tensor, ...]]


class GraphedSteps:
    """Calls `step(batch, rate)` through a graph for each shape and rate; without CUDA as it is.

    `step` must read what changes from one call to the next (learning rates, weights of losses) from
    tensors on the device, must not wait for the device, and must leave no gradient that the next
    call needs.
    """

    def __init__(self, step: Step, device: str) -> None:
        self.step, self.cuda = step, device == "cuda"
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Batch, tuple[torch.Tensor, ...]]] = {}
        if self.cuda:
            # cuDNN's attention plans every shape anew, which takes longer than it wins.
            torch.backends.cuda.enable_cudnn_sdp(False)
            self.side, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def stream(self) -> AbstractContextManager[Any]:
        """The stream that steps run on."""
        return torch.cuda.stream(self.side) if self.cuda else nullcontext()

    def wait(self) -> None:
        """Until every step is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def __call__(self, batch: Batch, rate: float) -> tuple[torch.Tensor, ...]:
        """The step's outputs, copied out of the graph."""
        if not self.cuda:
            return self.step(batch, rate)
        key = (rate, *(tuple(part.shape) for part in batch.tensors))
        with self.stream():
            for part in batch.tensors:
                part.record_stream(self.side)
            if key not in self.graphs:
                outputs = tuple(output.detach().clone() for output in self.step(batch, rate))
                self.graphs[key] = self._captured(batch, rate)
                return outputs
            graph, still, held = self.graphs[key]
            for own, new in zip(still.tensors, batch.tensors, strict=True):
                own.copy_(new)
            graph.replay()
            return tuple(output.clone() for output in held)

    def _captured(
        self, batch: Batch, rate: float
    ) -> tuple[torch.cuda.CUDAGraph, Batch, tuple[torch.Tensor, ...]]:
        still = batch.with_tensors([part.clone() for part in batch.tensors])
        graph = torch.cuda.CUDAGraph()
        # Another thread copies batches meanwhile, which the default mode would take for a part of
        # the capture.
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"
        ):
            outputs = tuple(output.detach() for output in self.step(still, rate))
        return graph, still, outputs


class Pool:
    """Batches on the device: new ones as a thread brings them, else one of the last `size` again.

    Drawing pages takes sixteen processors longer than training on them takes the GPU. Iterating
    gives (batch, new).
    """

    def __init__(
        self, batches: Iterator[Batch], device: str, size: int = 300, first: int = 60
    ) -> None:
        """Nothing is repeated before there are `first` batches to choose from: some kinds come
        late.
        """
        self.batches, self.device, self.size, self.first = batches, device, size, first
        self.held: list[Batch] = []
        self.place = 0
        self.random = random.Random(0)
        self.fresh: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=4)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._bring, daemon=True)
        self.thread.start()

    def _bring(self) -> None:
        # One stream for good: PyTorch hands out the same few in turn, and one that is being
        # captured takes no copy.
        copies = torch.cuda.Stream() if self.device == "cuda" else None
        try:
            while not self.stopped.is_set():
                self.fresh.put(self._moved(next(self.batches), copies))
        except BaseException as error:
            self.fresh.put(error)

    def _moved(self, batch: Batch, copies: torch.cuda.Stream | None) -> Batch:
        if copies is None:
            return batch
        with torch.cuda.stream(copies):
            moved = batch.with_tensors(
                [part.to(self.device, non_blocking=True) for part in batch.tensors]
            )
        copies.synchronize()
        return moved

    def close(self) -> None:
        """End the thread, and let go of the loader, which then ends its workers."""
        self.stopped.set()
        while self.thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self.fresh.get(timeout=0.1)
        self.batches = iter(())

    def __iter__(self) -> Iterator[tuple[Batch, bool]]:
        while True:
            try:
                brought = self.fresh.get(block=len(self.held) < self.first)
            except queue.Empty:
                yield self.random.choice(self.held), False
                continue
            if isinstance(brought, BaseException):
                raise brought
            if len(self.held) < self.size:
                self.held.append(brought)
            else:
                self.held[self.place % self.size] = brought
                self.place += 1
            yield brought, True
