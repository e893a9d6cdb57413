"""The end of every run: what is on disk, not what was in memory, is verified, read back and held
against BF16.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from rich.console import Console
from torch import nn

from accuracy.agreement import States, compare
from accuracy.answers import answer_tasks
from accuracy.gate import Thresholds, judge, show
from accuracy.paired import Paired, pair
from checkpoint.config import CheckpointConfig, read_config
from export.manifest import Manifest, write_manifest
from export.verify import show_faults, verify
from recipes.schema import Recipe
from tiny.tasks import items

say = functools.partial(Console(stderr=True).print, highlight=False, soft_wrap=True)


def conclude(
    recipe: Recipe,
    config: CheckpointConfig,
    manifest: Manifest,
    reference: Callable[[], Sequence[States]],
    read_back: Callable[[], tuple[Sequence[States], nn.Module]],
    device: str,
) -> int:
    """Verify and measure the output, write the verdict into its manifest.

    Args:
        recipe: The run's.
        config: The BF16 checkpoint's.
        manifest: The record of the run so far.
        reference: Gives BF16's states of the held-out prompts.
        read_back: Gives those of the directory read back, and its `lm_head`.
        device: Where the tasks are answered.

    Returns:
        0 when it is sound and the gate passed, 1 otherwise.
    """
    faults = verify(recipe.output, config.directory)
    show_faults(recipe.output, faults)
    gate: dict[str, object] = {"passed": False, "missed": [str(fault) for fault in faults]}
    if not faults:
        answers, lm_head = read_back()
        measured = compare(reference(), answers, lm_head, config.image_token_id)
        accuracy, tasks = recipe.accuracy, recipe.accuracy.tasks
        allowed = Thresholds(
            accuracy.max_kl,
            accuracy.min_top1,
            accuracy.max_perplexity_ratio,
            tasks.max_loss if tasks else None,
        )
        verdict = judge(measured, allowed, task_rows(recipe, config, device) if tasks else ())
        show(verdict)
        gate = verdict.as_dict()
    write_manifest(recipe.output, dataclasses.replace(manifest, gate=gate))
    say(
        f"{recipe.output}: {'done; next: python -m serve ' + str(recipe.output) if gate['passed'] else 'FAILED'}"
    )
    return 0 if gate["passed"] else 1


def task_rows(recipe: Recipe, config: CheckpointConfig, device: str) -> list[Paired]:
    """The tasks' test items answered by BF16 and by the output, with clips pruned as they will be
    served.
    """
    tasks, rate = recipe.accuracy.tasks, recipe.serve.video_pruning_rate
    assert tasks is not None
    samples = {name: items(name, count=tasks.items) for name in tasks.names}
    reference = answer_tasks(config, samples, rate, device)
    return pair(samples, reference, answer_tasks(read_config(recipe.output), samples, rate, device))
