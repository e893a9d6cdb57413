"""Calibration layer by layer: prompts are embedded once, then every layer runs over all of them.

Samples of one length run together where the result is bit for bit that of one by one: each shape is
tried at the first layer of each kind, the inputs of every linear are compared, and samples run
singly where they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from calibrate.activations import Activations, Batch
from calibrate.forward import BAR, Counts, Embedded, embed
from calibrate.prompts import Prompt
from checkpoint.config import CheckpointConfig

if TYPE_CHECKING:
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3

Run = Callable[[torch.Tensor], torch.Tensor]
"""Maps [batch, length, hidden] to the same shape."""


def embed_into(
    activations: Activations,
    model: NemotronH_Omni_Reasoning_V3,
    prompts: Iterable[Prompt],
    config: CheckpointConfig,
    total: int,
    on_embedded: Callable[[Prompt, Embedded], None] | None = None,
    share: tuple[int, int] = (0, 1),
    describe: str = "embed",
) -> Counts:
    """Embed prompts and keep the input of the language model's first layer.

    Args:
        activations: Empty, or filled so far.
        model: With vision tower, projector and embeddings; its layers are not used.
        prompts: The prompts of all processes.
        config: The checkpoint's.
        total: Number of prompts.
        on_embedded: Called with each prompt that is kept and its embedding.
        share: (index, count): of every `count` prompts the one with number `index` is kept.
        describe: Name on the progress bar.

    Returns:
        What was kept.
    """
    index, count = share
    counts = Counts()
    with (
        torch.no_grad(),
        tqdm(prompts, describe, total, unit="sample", disable=None, bar_format=BAR) as bar,
    ):
        for number, prompt in enumerate(bar):
            if number % count != index:
                continue
            embedded = embed(model, prompt, config)
            activations.add(embedded.inputs_embeds)
            if on_embedded is not None:
                on_embedded(prompt, embedded)
            counts = counts.plus(embedded)
    return counts


def runner(model: Any) -> Run:
    """Return the function that runs a single layer of `checkpoint.layers`."""

    def run(inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return output

    return run


class Batching:
    """Decides which samples run together: those of one length, where that changes no bit.

    A shape is tried once for each kind of layer, so asking again at every layer costs nothing.
    """

    def __init__(self, tokens: int) -> None:
        """Allow batches of up to `tokens` tokens."""
        self._tokens = tokens
        self._unchanged: dict[tuple[str, int, int], bool] = {}

    def batches(self, activations: Activations, model: nn.Module, kind: str) -> list[Batch]:
        """Return the batches in which to run `activations` through a layer.

        Args:
            activations: The samples.
            model: The layer, without quantizers yet.
            kind: Its kind: `mamba`, `mlp` or `attention`.
        """
        chosen: list[Batch] = []
        for batch in activations.batches(self._tokens):
            if len(batch) == 1 or self._may_run_together(batch, activations, model, kind):
                chosen.append(batch)
            else:
                for index in batch:
                    chosen.append((index,))
        return chosen

    def _may_run_together(
        self, batch: Batch, activations: Activations, model: nn.Module, kind: str
    ) -> bool:
        shape = (kind, len(batch), activations.lengths[batch[0]])
        if shape not in self._unchanged:
            self._unchanged[shape] = _same_together(model, activations.take(batch))
        return self._unchanged[shape]


@torch.no_grad()
def _same_together(model: nn.Module, inputs: torch.Tensor) -> bool:
    """Whether each row of a batch gives the same bits alone: outputs and inputs of every linear."""
    run = runner(model)
    with _linear_inputs(model) as together:
        outputs = run(inputs)
    for number, row in enumerate(inputs):
        with _linear_inputs(model) as alone:
            output = run(row[None])
        if not torch.equal(output[0], outputs[number]):
            return False
        for single, whole in zip(alone, together, strict=True):
            if not torch.equal(single[0], whole[number]):
                return False
    return True


@contextmanager
def _linear_inputs(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the input of every linear: its range is calibrated, not the output's."""
    collected: list[torch.Tensor] = []

    def collect(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        collected.append(inputs[0])

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(collect))
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()
