"""Efficient Video Sampling: which video tokens serving drops, bit for bit as vLLM does.

Source: arXiv 2510.14624 as implemented in vllm/multimodal/video_prune/evs.py (0.32).
"""

from __future__ import annotations

from typing import cast

import torch

from checkpoint.libraries import model_classes


def retained_tokens(frames: int, tokens_per_frame: int, rate: float) -> int:
    """Return how many of a clip's visual tokens remain; at least those of one frame.

    Args:
        frames: Sampled frames.
        tokens_per_frame: Visual tokens per frame.
        rate: EVS rate, 0 <= rate < 1.
    """
    return max(tokens_per_frame, int(tokens_per_frame * frames * (1 - rate)))


def retention_mask(
    embeddings: torch.Tensor, frames: int, rows: int, cols: int, rate: float
) -> torch.Tensor:
    """Return which of a clip's visual tokens remain.

    Each token is scored by its dissimilarity, 1 - cosine, to the same place in the previous frame;
    the first frame is kept whole. Scores have the embeddings' own dtype: in BF16 many are equal,
    and of equal scores the earlier token is kept. So the mask is exact for given embeddings; two
    engines whose embeddings differ by rounding may exchange a few tokens at the cut (8 of 512
    between transformers and vLLM on the tiny checkpoint), which shifts the positions behind them.

    Args:
        embeddings: Projector output [frames * rows * cols, hidden], frame after frame, row after
            row.
        frames: Sampled frames.
        rows: Token rows per frame.
        cols: Token columns per frame.
        rate: Share of tokens to drop, 0 <= rate < 1. Rate 0 keeps all.

    Returns:
        Bool [frames * rows * cols] with exactly `retained_tokens` true.
    """
    # transformers' function equals vLLM's step by step; tests/calibrate/test_against_vllm.py
    # compares the two, equal scores included.
    size = cast(torch.LongTensor, (frames, rows, cols))  # it only unpacks three numbers
    mask: torch.Tensor = model_classes().compute_retention_mask(
        video_embeds=cast(torch.FloatTensor, embeddings), thw=size, spatial_merge_size=1, q=rate
    )
    return mask
