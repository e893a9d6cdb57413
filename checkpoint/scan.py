"""The Mamba-2 scan for CPUs: transformers' fallback gives the same numbers and takes several times as long.

transformers repeats B and C for every head before it multiplies; with 64 heads that is most of its time and memory.
Here heads of one group share one product, and the chunk is short, as its cost grows with its square.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.nemotron_h import modeling_nemotron_h as native

# Positions of a chunk. The result does not depend on it but for rounding.
_CHUNK = 32


def use_grouped_scan() -> None:
    """Put `grouped_scan` in the place of transformers' own fallback, unless mamba_ssm's kernels stand there."""
    fallback = getattr(native.mamba2_chunk_scan, "__wrapped__", None)
    if fallback is not None and fallback.__module__ == native.__name__ and not _has_mamba_ssm():
        native.mamba2_chunk_scan = grouped_scan  # type: ignore[assignment]


def _has_mamba_ssm() -> bool:
    try:
        import mamba_ssm.ops.triton.ssd_combined  # noqa: F401
    except Exception:  # whatever a half-installed package raises
        return False
    return True


def grouped_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    """`mamba2_chunk_scan` of transformers, argument for argument; `chunk_size` is not used.

    Args:
        hidden_states: [items, length, heads, head_dim].
        dt: [items, length, heads].
        A: [heads], negative.
        B: [items, length, groups, state].
        C: [items, length, groups, state].
        chunk_size: Taken for the signature's sake.
        D: [heads].
        dt_bias: [heads].
        initial_states: [items, heads, head_dim, state].
        dt_softplus: Step sizes go through softplus.
        dt_limit: Bounds of the step sizes.
        return_final_states: Also return the state behind the last position.

    Returns:
        Float32 [items, length, heads, head_dim], and the final state [items, heads, head_dim, state] when asked for.
    """
    items, length, heads, width = hidden_states.shape
    groups, state = B.shape[2:]
    each = heads // groups
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = nn.functional.softplus(dt)
    step = dt.clamp(dt_limit[0], dt_limit[1]).float()
    values = hidden_states.float()
    pad = -length % _CHUNK
    chunks = (length + pad) // _CHUNK

    def chunked(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
        """[items, length, …] to [items, chunks, groups, _CHUNK, …]."""
        padded = nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, pad))
        return padded.reshape(items, chunks, _CHUNK, groups, *shape).transpose(2, 3)

    x = chunked(values * step[..., None], each * width)
    b, c = chunked(B.float(), state), chunked(C.float(), state)
    decay = chunked(step * A.float(), each).cumsum(3)
    # Within a chunk: C B^T, once a group, weighted by each head's decay between the two positions.
    by_head = decay.permute(0, 1, 2, 4, 3)
    between = (by_head[..., :, None] - by_head[..., None, :]).masked_fill(
        torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=x.device).triu(1), -torch.inf
    )
    mixed = between.exp() * (c @ b.mT)[:, :, :, None]
    x_by_head = x.unflatten(-1, (each, width)).transpose(3, 4)
    inside = (mixed @ x_by_head).transpose(3, 4)
    # Across chunks: each chunk's own contribution to the state, then the recurrence over chunks.
    to_end = (decay[:, :, :, -1:] - decay).exp()
    added = b.mT @ (x.unflatten(-1, (each, width)) * to_end[..., None]).flatten(-2)
    whole = decay[:, :, :, -1].exp().repeat_interleave(width, dim=-1)[:, :, :, None]
    if initial_states is None:
        carried = x.new_zeros(items, groups, state, each * width)
    else:
        carried = initial_states.float().reshape(items, groups, each * width, state).mT
    before = []
    for chunk in range(chunks):
        before.append(carried)
        carried = carried * whole[:, chunk] + added[:, chunk]
    across = (c @ torch.stack(before, dim=1)).unflatten(-1, (each, width)) * decay.exp()[..., None]
    output = (inside + across).transpose(2, 3).reshape(items, chunks * _CHUNK, heads, width)[:, :length]
    if D is not None:
        output = output + D.float()[:, None] * values
    if return_final_states:
        return output, carried.mT.reshape(items, heads, width, state)
    return output
