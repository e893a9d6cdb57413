"""Calibration a layer at a time: prompts embedded once, then every layer run over what the one
before it left.

Samples of one length run together where the result is bit for bit that of one by one: each shape is
tried at the first layer of each kind, inputs of every linear compared, and run singly where they
differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from calibrate.activations import Activations, Batch
from calibrate.forward import BAR, Counts, Embedded, embed
from calibrate.prompts import Prompt
from checkpoint.classes import NemotronH_Omni_Reasoning_V3
from checkpoint.config import CheckpointConfig

Run = Callable[[torch.Tensor], torch.Tensor]


def embed_into(
    activations: Activations,
    model: NemotronH_Omni_Reasoning_V3,
    prompts: Iterable[Prompt],
    config: CheckpointConfig,
    pruning_rate: float,
    total: int,
    seen: Callable[[Prompt, Embedded], object] = lambda prompt, embedded: None,
    mine: Callable[[int], bool] = lambda number: True,
    describe: str = "embed",
) -> Counts:
    """Embed prompts and keep what the language model's first layer is given.

    Args:
        activations: Empty, or filled so far.
        model: With vision tower, projector and embeddings; its layers are not used.
        prompts: Unpruned.
        config: The checkpoint's.
        pruning_rate: EVS rate of the videos.
        total: How many prompts will come.
        seen: Called with each prompt kept and its embedding.
        mine: Which prompts, by number, this process is to keep.
        describe: Name on the progress bar.

    Returns:
        What was kept.
    """
    samples = tokens = kept = pruned = 0
    with (
        torch.no_grad(),
        tqdm(prompts, describe, total, unit="sample", disable=None, bar_format=BAR) as bar,
    ):
        for number, prompt in enumerate(bar):
            if not mine(number):
                continue
            embedded = embed(model, prompt, config, pruning_rate)
            activations.add(embedded.inputs_embeds)
            seen(prompt, embedded)
            samples += 1
            tokens += len(embedded.token_ids)
            kept += embedded.video_tokens_kept
            pruned += embedded.video_tokens_pruned
    return Counts(samples, tokens, kept, pruned)


def runner(model: Any) -> Run:
    """What a single layer of `checkpoint.layers` makes of [batch, length, hidden]."""

    def run(inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return output

    return run


class Batching:
    """Which samples run together: those of one length, where that changes no bit.

    Cheap to ask again at every layer: a shape is tried once for each kind of layer.
    """

    def __init__(self, tokens: int) -> None:
        """Allow batches of up to `tokens` tokens."""
        self._tokens = tokens
        self._same: dict[tuple[str, int, int], bool] = {}

    def batches(self, activations: Activations, model: nn.Module, kind: str) -> list[Batch]:
        """The batches in which to run `activations` through a layer whose quantizers are not there
        yet.
        """
        found: list[Batch] = []
        for batch in activations.batches(self._tokens):
            shape = (kind, len(batch), activations.lengths[batch[0]])
            if len(batch) > 1 and shape not in self._same:
                self._same[shape] = _same_together(model, activations.take(batch))
            found += (
                [batch] if len(batch) == 1 or self._same[shape] else [(index,) for index in batch]
            )
        return found


@torch.no_grad()
def _same_together(model: nn.Module, inputs: torch.Tensor) -> bool:
    run = runner(model)
    with _linear_inputs(model) as seen:
        together = run(inputs)
        batched = list(seen)
    for number, row in enumerate(inputs):
        with _linear_inputs(model) as seen:
            alone = run(row[None])
            if not torch.equal(alone[0], together[number]):
                return False
            if not all(
                torch.equal(single[0], whole[number])
                for single, whole in zip(seen, batched, strict=True)
            ):
                return False
    return True


@contextmanager
def _linear_inputs(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect what every linear is given: its range is calibrated, not the output's."""
    seen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
