"""Accuracy on the test items in training's own batches: minutes of single answers become seconds of
whole batches.
"""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from checkpoint.config import read_config
from checkpoint.native import load_tokenizer
from tiny.tasks import TASKS, TEST_ITEMS, scene, series
from tiny.training.data import Batch, Item, PromptBuilder, collate, make_item, padded_length

PRUNING_RATES = (0.0, 0.5, 0.75, 0.9)
_TOKENS = 16384


def drawn_items(directory: Path, workers: int, count: int = TEST_ITEMS) -> list[Item]:
    """The first `count` test items of every task.

    Args:
        directory: A checkpoint with the tokenizer and the configuration.
        workers: Processes that draw items; 0 for none.
        count: Items of a task.
    """
    jobs = [(task, index, str(directory)) for task in TASKS for index in range(count)]
    if not workers:
        return [_item(job) for job in jobs]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return pool.map(_item, jobs, chunksize=8)


@torch.no_grad()
def evaluated(
    losses: Callable[[Batch, float], tuple[torch.Tensor, torch.Tensor]],
    items: list[Item],
    visual_id: int,
) -> dict[str, float]:
    """Share of right answers by task, clips at every pruning rate as `task@rate`.

    Args:
        losses: Of a batch at a pruning rate, whose second result says which questions would be
            answered exactly.
        items: As `drawn_items` gives them.
        visual_id: The token that stands for a visual one.
    """
    results = {}
    for task in TASKS:
        groups: dict[tuple[int, int], list[Item]] = defaultdict(list)
        for item in items:
            if item.kind == task:
                groups[len(item.tiles), padded_length(item)].append(item)
        for rate in PRUNING_RATES if task.startswith("video") else (0.0,):
            right: list[bool] = []
            for (_, length), group in groups.items():
                size = max(1, _TOKENS // length)
                for start in range(0, len(group), size):
                    batch = collate(group[start : start + size], visual_id, length)
                    right += losses(batch, rate)[1][: len(batch.kinds)].tolist()
            results[task if rate == 0 else f"{task}@{rate}"] = round(sum(right) / len(right), 4)
    return results


_builders: dict[str, PromptBuilder] = {}


def _item(job: tuple[str, int, str]) -> Item:
    task, index, directory = job
    if directory not in _builders:
        torch.set_num_threads(1)
        config = read_config(directory)
        _builders[directory] = PromptBuilder(config, load_tokenizer(config))
    return make_item(
        scene(task, series("test", 0), index), task, _builders[directory], compressed=True
    )
