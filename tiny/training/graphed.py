"""Runs training steps as CUDA graphs, and draws batches in a thread.

A small model spends most of its time waiting for kernel launches: on an H100, a step of the tiny
checkpoint is 13 ms of kernels in 100 ms of launches. So forward pass, backward pass and optimizers
are captured together as one graph per shape of batch. The first step of a shape runs without a
graph, because it compiles and tunes everything that the shape needs.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tiny.training.data import Batch

Step = Callable[[Batch, float], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class _Captured:
    """A captured step.

    Attributes:
        graph: The graph.
        batch: The batch that the graph reads; a new batch is copied into its tensors.
        outputs: The tensors that the graph writes.
    """

    graph: torch.cuda.CUDAGraph
    batch: Batch
    outputs: tuple[torch.Tensor, ...]


class GraphedSteps:
    """Calls `step(batch, rate)` through one CUDA graph per shape and rate; on a CPU, directly.

    `step` must read what changes from one call to the next (learning rates, weights of losses) from
    tensors on the device. It must not wait for the device, and must leave no gradient that the next
    call needs.
    """

    def __init__(self, step: Step, device: str) -> None:
        self.step = step
        self.cuda = device == "cuda"
        self.graphs: dict[Any, _Captured] = {}
        if self.cuda:
            # cuDNN's attention makes a plan for every new shape, which costs more time than it
            # saves here.
            torch.backends.cuda.enable_cudnn_sdp(False)
            self.side = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()

    def stream(self) -> AbstractContextManager[Any]:
        """Return a context in which work goes to the CUDA stream of the steps."""
        return torch.cuda.stream(self.side) if self.cuda else nullcontext()

    def wait(self) -> None:
        """Wait until all steps are finished."""
        if self.cuda:
            torch.cuda.synchronize()

    def __call__(self, batch: Batch, rate: float) -> tuple[torch.Tensor, ...]:
        """Run one step and return copies of its outputs."""
        if not self.cuda:
            return self.step(batch, rate)
        shapes = tuple(tuple(tensor.shape) for tensor in batch.tensors)
        key = (rate, shapes)
        with self.stream():
            for tensor in batch.tensors:
                tensor.record_stream(self.side)
            if key not in self.graphs:
                outputs = self.step(batch, rate)
                copies = tuple(output.detach().clone() for output in outputs)
                self.graphs[key] = self._capture(batch, rate)
                return copies
            captured = self.graphs[key]
            for own, new in zip(captured.batch.tensors, batch.tensors, strict=True):
                own.copy_(new)
            captured.graph.replay()
            return tuple(output.clone() for output in captured.outputs)

    def _capture(self, batch: Batch, rate: float) -> _Captured:
        own = batch.with_tensors([tensor.clone() for tensor in batch.tensors])
        graph = torch.cuda.CUDAGraph()
        # "thread_local", because the thread of `Pool` copies batches meanwhile. The default mode
        # ends the capture with an error when another thread calls CUDA.
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"
        ):
            outputs = tuple(output.detach() for output in self.step(own, rate))
        return _Captured(graph, own, outputs)


class Pool:
    """Yields new batches as a thread brings them to the device, and earlier ones in between.

    Drawing pages takes sixteen processors longer than training on them takes the GPU. Iterating
    yields pairs of a batch and whether it is new.

    Args:
        batches: The new batches.
        device: Device that they are moved to.
        size: Number of batches kept for repetition; the oldest is replaced first.
        first: Number of batches before any is repeated, because batches of some kinds come late.
    """

    def __init__(
        self, batches: Iterator[Batch], device: str, size: int = 300, first: int = 60
    ) -> None:
        self.batches = batches
        self.device = device
        self.size = size
        self.first = first
        self.held: list[Batch] = []
        self.place = 0
        self.random = random.Random(0)
        self.fresh: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=4)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._bring, daemon=True)
        self.thread.start()

    def _bring(self) -> None:
        """Fill the queue until the pool is closed; an error of the loader goes into the queue."""
        # The thread keeps one stream. PyTorch returns the same few streams in turn, and nothing can
        # be copied on one whose work is being captured.
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
            tensors = [tensor.to(self.device, non_blocking=True) for tensor in batch.tensors]
        copies.synchronize()
        return batch.with_tensors(tensors)

    def close(self) -> None:
        """Stop the thread, and release the loader, which then ends its workers."""
        self.stopped.set()
        while self.thread.is_alive():
            # The thread may be waiting for a place in the queue.
            with contextlib.suppress(queue.Empty):
                self.fresh.get(timeout=0.1)
        self.batches = iter(())

    def __iter__(self) -> Iterator[tuple[Batch, bool]]:
        while True:
            must_wait = len(self.held) < self.first
            try:
                brought = self.fresh.get(block=must_wait)
            except queue.Empty:
                yield self.random.choice(self.held), False
                continue
            if isinstance(brought, BaseException):
                raise brought
            self._hold(brought)
            yield brought, True

    def _hold(self, batch: Batch) -> None:
        if len(self.held) < self.size:
            self.held.append(batch)
        else:
            self.held[self.place % self.size] = batch
            self.place += 1
