"""Measures what one token costs in the language model's layers: time and memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from checkpoint.layers import LayerBuilder, layer_specs
from checkpoint.opened import Checkpoint

_REPEATS = 3
"""Times that a layer is timed; the shortest counts, as other work on the machine only adds."""

_TRIED_TOKENS = {"cpu": 256, "cuda": 2048}
"""Tokens that a layer is timed with, at most. On a CPU two chunks of the 12B's scan: of fewer, a
small layer's time is that of calling it.
"""


@dataclass(frozen=True)
class LayerCost:
    """The cost of one token.

    Attributes:
        seconds: In all layers together.
        workspace: Bytes of memory besides weights, in the layer that needs most.
    """

    seconds: float
    workspace: float


@torch.no_grad()
def measure_layer_cost(checkpoint: Checkpoint, device: str, tokens: int) -> LayerCost:
    """Run one layer of each kind, on the device and with the weights of the run.

    Args:
        checkpoint: A layer of each kind is read.
        device: Where layers run.
        tokens: Length of a typical sample.
    """
    config = checkpoint.config
    cuda = device.startswith("cuda")
    tokens = max(1, min(tokens, _TRIED_TOKENS["cuda" if cuda else "cpu"]))
    builder = LayerBuilder(checkpoint)
    kinds = [config.mixer_kind(layer) for layer in range(config.depth)]
    inputs = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, device=device)
    seconds = 0.0
    workspace = 0.0
    for kind in sorted(set(kinds)):
        layer = kinds.index(kind)
        tensors = {}
        for name in layer_specs(checkpoint, layer):
            tensors[name] = checkpoint.tensors.read(name).to(device)
        model = builder.build(layer, tensors).model
        model(inputs_embeds=inputs, use_cache=False)  # kernels are compiled and chosen here
        before = _begin_measuring(device) if cuda else 0
        taken = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            model(inputs_embeds=inputs, use_cache=False)
            if cuda:
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - start)
        if cuda:
            peak = torch.cuda.max_memory_allocated(device)
            workspace = max(workspace, (peak - before) / tokens)
        seconds += min(taken) / tokens * kinds.count(kind)
        del model, tensors
    return LayerCost(seconds, workspace or cpu_workspace(checkpoint))


def _begin_measuring(device: str) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def cpu_workspace(checkpoint: Checkpoint) -> float:
    """Estimate the bytes per token that a layer needs on a CPU, where nothing counts them.

    transformers' plain Mamba-2 expands B and C to all heads in float32 and holds scores of every
    position with its chunk; the rest is a few copies of the widest activation.
    """
    text = checkpoint.config.text
    per_head = 3 * text["ssm_state_size"] + 4 * text["chunk_size"] + text["mamba_head_dim"]
    scan = 4 * text["mamba_num_heads"] * per_head
    widest = max(max(linear.shape) for linear in checkpoint.linears)
    return scan + 4 * 2 * widest
