"""Efficient Video Sampling (EVS): which video tokens serving drops, bit for bit as vLLM does.

    python -m calibrate.evs CLIP --model DIR --rate 0.75 --out sheet.png

Draws the sampled frames of a clip with the dropped patches dimmed, the patches kept of each frame,
and the tokens of a prompt with the clip. DIR's vision tower runs; it may be BF16 or an export, and
the layers of its language model are not loaded.

Source: arXiv 2510.14624 as implemented in vllm/multimodal/video_prune/evs.py (0.32).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import torch

from checkpoint.atomic import check_result_file
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import Fault, main, raise_if_any
from checkpoint.libraries import model_classes, prepare_libraries
from checkpoint.log import get_logger
from checkpoint.reading import regular_file_fault
from checkpoint.video import Video

logger = get_logger("calibrate.evs")


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
    between transformers and vLLM on the tiny checkpoint), which shifts the positions after them.

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


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("calibrate.evs", __doc__)
    parser.add_argument("clip", type=Path, metavar="CLIP", help="video file")
    model_help = "checkpoint whose vision tower scores the patches"
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help=model_help)
    default = Video()
    rate = default.pruning_rate
    rate_help = f"share of the visual tokens that is dropped (default: {rate:g})"
    parser.add_argument("--rate", type=float, default=rate, metavar="Q", help=rate_help)
    fps_help = f"frames sampled per second (default: {default.fps:g})"
    parser.add_argument("--fps", type=float, default=default.fps, metavar="FPS", help=fps_help)
    frames_help = f"most frames sampled (default: {default.max_frames})"
    parser.add_argument(
        "--max-frames", type=int, default=default.max_frames, metavar="N", help=frames_help
    )
    out_help = "PNG to write (default: sheet.png)"
    parser.add_argument("--out", type=Path, default=Path("sheet.png"), metavar="PNG", help=out_help)
    columns_help = "frames in a row (default: by their number)"
    parser.add_argument("--columns", type=int, metavar="N", help=columns_help)
    return parser


def _check(options: argparse.Namespace) -> None:
    """Check the options.

    Raises:
        BadInput: With every fault.
    """
    faults = []
    unreadable = regular_file_fault(options.clip)
    if unreadable is not None:
        faults.append(unreadable)
    if not 0 <= options.rate < 1:
        remedy = "give 0 (off) up to but not including 1"
        faults.append(Fault("--rate", f"is {options.rate}", remedy))
    if not 0 < options.fps < float("inf"):
        faults.append(Fault("--fps", f"is {options.fps}", "give a number above 0"))
    if options.max_frames < 1:
        faults.append(Fault("--max-frames", f"is {options.max_frames}", "give 1 or more"))
    if options.columns is not None and not 1 <= options.columns <= 100:
        faults.append(Fault("--columns", f"is {options.columns}", "give 1 to 100"))
    if options.out.suffix.lower() != ".png":
        faults.append(Fault(str(options.out), "is not the name of a PNG", "give --out FILE.png"))
    elif not options.out.absolute().parent.is_dir():
        faults.append(Fault(str(options.out.parent), "is not a folder", "create it"))
    raise_if_any(faults)
    check_result_file(options.out)


def _run() -> int:
    options = parse_command(_parser())
    _check(options)
    prepare_libraries()
    from calibrate.contact_sheet import draw_sheet, prune_clip, write_sheet
    from checkpoint.opened import open_checkpoint

    checkpoint = open_checkpoint(options.model)
    video = Video(pruning_rate=options.rate, fps=options.fps, max_frames=options.max_frames)
    data = options.clip.read_bytes()
    kept = prune_clip(data, options.clip.name, checkpoint, video, options.columns)
    write_sheet(draw_sheet(kept, options.columns), options.out)
    count = len(kept.frames)
    print(f"{options.out}: {count} {'frame' if count == 1 else 'frames'}, {kept.budget()}")
    if count > 1 and not kept.mask[1:].any():
        # vLLM drops the rest without a word.
        logger.warning("only the first frame survives: lower --rate, or sample more frames")
    return 0


if __name__ == "__main__":
    main(_run)
