"""Efficient Video Sampling: which video tokens serving drops, bit for bit as vLLM does with
`--video-pruning-rate`.

Source: arXiv 2510.14624 as shipped in vllm/multimodal/video_prune/evs.py (0.32).
"""

from __future__ import annotations

from typing import cast

import torch

from checkpoint.classes import compute_retention_mask
from checkpoint.faults import BadInput, Fault


def check_rate(rate: float) -> None:
    """Raise `BadInput` unless 0 <= `rate` < 1."""
    if not 0.0 <= rate < 1.0:
        raise BadInput(
            Fault("video_pruning_rate", f"is {rate}", "give 0 (off) up to but not including 1")
        )


def retained_tokens(frames: int, tokens_per_frame: int, rate: float) -> int:
    """Return how many of a clip's `frames` x `tokens_per_frame` tokens remain; at least one frame's
    worth.
    """
    return max(tokens_per_frame, int(tokens_per_frame * frames * (1 - rate)))


def retention_mask(
    embeddings: torch.Tensor, frames: int, rows: int, cols: int, rate: float
) -> torch.Tensor:
    """Return which of a clip's tokens remain.

    Each token is scored by its dissimilarity, 1 - cosine, to the same place in the frame before;
    the first frame is kept whole. The scores are those of the embeddings' own dtype: in BF16 many
    tie, and ties go to the earlier token. So the mask is exact for given embeddings; two engines
    whose embeddings differ by rounding may swap a few tokens at the cut (8 of 512 between
    transformers and vLLM on the tiny checkpoint), which shifts the positions after them.

    Args:
        embeddings: Projector output [frames * rows * cols, hidden], frame after frame, row after
            row.
        frames: Sampled frames.
        rows: Token rows of a frame.
        cols: Token columns of a frame.
        rate: Share of tokens to drop, 0 <= rate < 1. Rate 0 keeps all.

    Returns:
        Bool [frames * rows * cols] with exactly `retained_tokens` true.
    """
    # transformers' function is vLLM's step for step, so it is called instead of written a third
    # time; tests/calibrate/test_against_vllm.py holds it to vLLM's masks, ties included.
    size = cast(
        torch.LongTensor, (frames, rows, cols)
    )  # its annotation; it only unpacks three numbers
    return compute_retention_mask(
        video_embeds=cast(torch.FloatTensor, embeddings), thw=size, spatial_merge_size=1, q=rate
    )
