"""Compares stored input scales with the inputs that linears of the source really have, on a few
prompts.

Text prompts only: of pictures, the vision tower would have to be in memory. The model runs layer by
layer, so that never more than two layers are in memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from checkpoint.faults import Fault
from checkpoint.layers import read_layers
from checkpoint.opened import Checkpoint
from quantize.formats.registry import FORMATS

PROMPTS = (
    "What is the total of the second column, and which of the 12 rows is the largest?",
    "Describe in one sentence what changes between 0.50 and 31.00 seconds of the film.",
    "def area(width, height):\\n    return width * height  # in mm²",
)

FACTOR = 5.0
"""How many times as large or small as the observed range a stored one may be, compared with the
median of this quotient over all linears of the same kind. On the tiny checkpoint the quotient is
0.4 to 2.0 times its median. A model whose few tokens give some linears far larger inputs than all
others may go beyond it, so this is asked only where no SHA-256 vouches for the scales."""
_MEDIAN = (0.25, 25.0)
"""The median itself is taken for at least and at most this. It is 0.7 to 1.4 on the tiny
checkpoint; pictures may give inputs that no text gives."""


def input_range_faults(
    exported: Checkpoint, formats: Mapping[str, str], source: Checkpoint
) -> Iterator[Fault]:
    """Yield a fault for each input scale that does not fit the inputs of its linear.

    Args:
        exported: The quantized checkpoint, with sound scales.
        formats: Format of every quantized linear.
        source: The BF16 checkpoint.
    """
    for name, quotient, expected in range_quotients(exported, formats, source):
        if not 1 / FACTOR <= quotient / expected <= FACTOR:
            what = f"stands for {quotient:.3g} times the largest input on {len(PROMPTS)} prompts,"
            what = f"{what} of other linears of the kind it is {expected:.3g} times"
            yield Fault(exported.tensors.where(name), what, "calibrate and export again")


def range_quotients(
    exported: Checkpoint, formats: Mapping[str, str], source: Checkpoint
) -> Iterator[tuple[str, float, float]]:
    """Yield the name of each input scale, its range divided by the observed one, and the median of
    this quotient over all linears of the kind.
    """
    observed = observed_ranges(source)
    kinds: dict[str, dict[str, float]] = {}
    for linear in exported.linears:
        format = FORMATS[formats[linear.name]] if linear.name in formats else None
        if format is None or format.input_amax is None or not observed[linear.name]:
            continue
        name = f"{linear.name}.input_scale"
        amax = float(format.input_amax(exported.tensors.read(name)))
        kinds.setdefault(linear.short, {})[name] = amax / observed[linear.name]
    for quotients in kinds.values():
        median = min(max(statistics.median(quotients.values()), _MEDIAN[0]), _MEDIAN[1])
        for name, quotient in quotients.items():
            yield name, quotient, median


@torch.no_grad()
def observed_ranges(source: Checkpoint) -> dict[str, float]:
    """Return the largest input magnitude of every linear on `PROMPTS`, by checkpoint name."""
    hidden = [_embedded(source, prompt) for prompt in PROMPTS]
    family = source.config.family
    largest = {linear.name: 0.0 for linear in source.linears}

    def observe(name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            largest[name] = max(largest[name], float(inputs[0].abs().max()))

        return hook

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for layer, model in read_layers(source, device, source.tensors.read):
        for linear in source.linears:
            if linear.layer == layer:
                module = model.get_submodule(family.native_module(linear.name))
                module.register_forward_pre_hook(observe(linear.name))
        outputs = []
        for states in hidden:
            output = model.model(inputs_embeds=states.to(device), use_cache=False)
            outputs.append(output.last_hidden_state)
        hidden = outputs
        del model
    return largest


def _embedded(source: Checkpoint, text: str) -> torch.Tensor:
    """The embeddings of a prompt, [1, length, hidden]; only its tokens' rows are read."""
    messages = [{"role": "user", "content": text}]
    rendered = source.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    tokens: Any = source.tokenizer.encode(rendered, add_special_tokens=False)
    name = f"{source.config.family.embeddings}.weight"
    rows = {token: source.tensors.read(name, rows=(token, token + 1)) for token in set(tokens)}
    return torch.cat([rows[token] for token in tokens])[None]
