"""Measures the accuracy on the test items in batches as in training.

Answering one item after another takes minutes; one pass over whole batches takes seconds.
"""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch

from checkpoint.config import read_config
from checkpoint.opened import load_tokenizer
from tiny.tasks import TASKS, TEST_ITEMS, scene, series
from tiny.training.data import Batch, collate, padded_length
from tiny.training.items import Item, PromptBuilder, make_item

PRUNING_RATES = (0.0, 0.5, 0.75, 0.9)
"""EVS rates that clips are evaluated at."""
_TOKENS = 16384
"""Tokens per batch at most."""

Losses = Callable[[Batch, float], tuple[torch.Tensor, torch.Tensor]]


def drawn_items(directory: Path, workers: int, count: int = TEST_ITEMS) -> list[Item]:
    """Return the first test items of every task.

    Args:
        directory: A checkpoint with tokenizer and configuration.
        workers: Number of processes that draw items; 0 draws them in this one.
        count: Items per task.
    """
    jobs = []
    for task in TASKS:
        for index in range(count):
            jobs.append((task, index, str(directory)))
    if not workers:
        return [_item(job) for job in jobs]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return pool.map(_item, jobs, chunksize=8)


@torch.no_grad()
def evaluated(losses: Losses, items: list[Item], visual_id: int) -> dict[str, float]:
    """Return the accuracy per task; clips at every pruning rate, as `task@rate`.

    Args:
        losses: Called with a batch and a pruning rate; its second result tells which questions are
            answered exactly, in the order of `Batch.kinds`.
        items: As `drawn_items` returns them.
        visual_id: The token that every visual token has.

    Returns:
        Shares of right answers, from 0 to 1.
    """
    results = {}
    for task in TASKS:
        rates = PRUNING_RATES if task.startswith("video") else (0.0,)
        for rate in rates:
            right: list[bool] = []
            for batch in _batches(task, items, visual_id):
                _, exact = losses(batch, rate)
                right += exact[: len(batch.kinds)].tolist()
            name = task if rate == 0 else f"{task}@{rate}"
            results[name] = round(sum(right) / len(right), 4)
    return results


def _batches(task: str, items: list[Item], visual_id: int) -> Iterator[Batch]:
    """Yield the items of a task in batches of equal length and equally many tiles."""
    groups: dict[tuple[int, int], list[Item]] = defaultdict(list)
    for item in items:
        if item.kind == task:
            groups[len(item.tiles), padded_length(item)].append(item)
    for (_, length), group in groups.items():
        size = max(1, _TOKENS // length)
        for start in range(0, len(group), size):
            yield collate(group[start : start + size], visual_id, length)


def _item(job: tuple[str, int, str]) -> Item:
    task, index, directory = job
    drawn = scene(task, series("test", 0), index)
    return make_item(drawn, task, _builder(directory), compressed=True)


@lru_cache
def _builder(directory: str) -> PromptBuilder:
    """Return the builder of a checkpoint; each process makes it once."""
    torch.set_num_threads(1)
    config = read_config(directory)
    return PromptBuilder(config, load_tokenizer(config))
