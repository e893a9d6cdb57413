"""Mamba-2's scan on a CPU, with the products of a group of heads computed once for all of them.

transformers' plain scan (5.19) repeats the input and output matrices of a group for each of its
heads: 32 times in the tiny checkpoint, 16 times in the 12B. This one computes the same sums without
the copies; `tests/checkpoint/test_scan.py` compares both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from checkpoint.libraries import language_model_classes

_SCAN = "mamba2_chunk_scan"
"""Its name in transformers' module of the language model."""


@contextlib.contextmanager
def grouped_scan() -> Iterator[None]:
    """Let the language models of this process scan by groups where their tensors are on the CPU."""
    modeling = language_model_classes()
    original = getattr(modeling, _SCAN)
    setattr(modeling, _SCAN, partial(_scan, original))
    try:
        yield
    finally:
        setattr(modeling, _SCAN, original)


def _scan(original: Callable[..., Any], states: torch.Tensor, *given: Any, **options: Any) -> Any:
    """Scan by groups, or as before on a GPU and from a state that is given."""
    if states.device.type != "cpu" or options.get("initial_states") is not None:
        return original(states, *given, **options)
    return scan_by_groups(states, *given, **options)


def scan_by_groups(
    states: torch.Tensor,
    steps: torch.Tensor,
    decay: torch.Tensor,
    into: torch.Tensor,
    out_of: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    """Scan sequences, chunk by chunk, as in the Mamba-2 paper (arXiv 2405.21060, section 6).

    Args:
        states: [batch, length, heads, width].
        steps: [batch, length, heads], before their bias and softplus.
        decay: A, [heads], negative.
        into: B, [batch, length, groups, state].
        out_of: C, [batch, length, groups, state].
        chunk_size: Positions of a chunk.
        D: What passes by, [heads].
        dt_bias: [heads], added to `steps`.
        dt_softplus: Whether `steps` go through softplus.
        dt_limit: Smallest and largest step.
        return_final_states: Whether to return the last states too.

    Returns:
        float32 [batch, length, heads, width], and the last states [batch, heads, width, state] if
        they are asked for.
    """
    batch, length, heads, width = states.shape
    groups, size = into.shape[2:]
    members = heads // groups
    if dt_bias is not None:
        steps = steps + dt_bias.to(steps.dtype)
    if dt_softplus:
        steps = F.softplus(steps)
    steps = steps.clamp(*dt_limit).float()
    chunks = -(-length // chunk_size)
    missing = chunks * chunk_size - length

    def by_chunk(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
        """[batch, length, …] as [batch, chunks, positions, *shape], padded behind the end."""
        padding = [0, 0] * (tensor.dim() - 2) + [0, missing]
        return F.pad(tensor, padding).view(batch, chunks, chunk_size, *shape)

    inputs = by_chunk(states.float() * steps[..., None], heads, width).transpose(2, 3)
    rates = by_chunk(decay.float() * steps, heads).transpose(2, 3)
    into = by_chunk(into.float(), groups, size).transpose(2, 3)
    out_of = by_chunk(out_of.float(), groups, size).transpose(2, 3)
    passed = rates.cumsum(-1)  # [batch, chunks, heads, positions]

    # Within a chunk: attention of each position to those before it, weighted by the decay between.
    lasting = passed[..., :, None] - passed[..., None, :]
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool).triu(1)
    lasting = lasting.masked_fill(later, -torch.inf).exp()
    scores = out_of @ into.transpose(-1, -2)  # [batch, chunks, groups, positions, positions]
    weights = scores[:, :, :, None] * lasting.unflatten(2, (groups, members))
    result = weights.flatten(2, 3) @ inputs

    # What a chunk adds to the states, [batch, chunks, groups, state, members * width].
    left = inputs * (passed[..., -1:] - passed).exp()[..., None]
    left = left.unflatten(2, (groups, members)).transpose(3, 4).flatten(4, 5)
    added = into.transpose(-1, -2) @ left

    # From chunk to chunk.
    kept = passed[..., -1].exp().view(batch, chunks, groups, 1, members, 1)
    kept = kept.expand(-1, -1, -1, -1, -1, width).flatten(4, 5)
    state = torch.zeros_like(added[:, 0])
    before = []
    for chunk in range(chunks):
        before.append(state)
        state = state * kept[:, chunk] + added[:, chunk]
    carried = out_of @ torch.stack(before, dim=1)
    carried = carried.unflatten(4, (members, width)).transpose(3, 4).flatten(2, 3)
    result = result + carried * passed.exp()[..., None]

    result = result.transpose(2, 3).reshape(batch, chunks * chunk_size, heads, width)[:, :length]
    if D is not None:
        result = result + D[:, None] * states.float()
    if not return_final_states:
        return result
    last = state.view(batch, groups, size, members, width).permute(0, 1, 3, 4, 2)
    return result, last.reshape(batch, heads, width, size)
