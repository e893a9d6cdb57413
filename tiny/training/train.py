"""Trains the tiny checkpoint on the six tasks, from a seed, on one GPU.

    python -m tiny.training.train ONE --minutes 12 [--seed 0] [--pause-after 9]
    python -m tiny.training.train TWO --minutes 7 --from ONE/checkpoint
    python -m tiny.training.train OUT --steps 4 --tokens 1500 --workers 0 --device cpu

The second command is the second stage, which also learns to compare; the third one tries the
program without a GPU. OUT gets `log.jsonl` (losses, and the accuracy of items that are seen for the
first time), `state.pt` and, at the end, `checkpoint/`, the released layout in BF16, and
`evaluation.json`. A run ends after `--steps` updates or `--minutes` of training, whichever comes
first, and the learning rate is scheduled by it. The same command resumes a run that was stopped. It
needs 40 GB of GPU memory and, for speed, mamba_ssm's Triton kernels (`pip install --no-deps`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from checkpoint.command import command_parser, parse_command
from checkpoint.faults import BadInput, Fault, main
from checkpoint.libraries import prepare_libraries
from tiny.training.settings import Settings


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("tiny.training.train", __doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="directory of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100000, help="updates at most")
    parser.add_argument(
        "--minutes", type=float, default=15.0, help="minutes of training at most, without pauses"
    )
    parser.add_argument(
        "--pause-after",
        type=float,
        default=1e9,
        metavar="MINUTES",
        help="save and stop this long after the start",
    )
    parser.add_argument("--tokens", type=int, default=16384, help="tokens per batch")
    parser.add_argument("--workers", type=int, default=13, help="processes that draw items")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--from",
        dest="start",
        metavar="DIR",
        type=Path,
        help="second stage, from the checkpoint of the first one",
    )
    parser.add_argument(
        "--no-compile",
        dest="compiled",
        action="store_false",
        help="do not compile element-wise operations",
    )
    return parser


def _run() -> int:
    given = parse_command(_parser())
    if given.device == "cuda" and not torch.cuda.is_available():
        raise BadInput(Fault("--device", "there is no CUDA device", "try --device cpu"))
    settings = Settings(
        out=given.out,
        seed=given.seed,
        steps=given.steps,
        minutes=given.minutes,
        pause_after=given.pause_after,
        tokens=given.tokens,
        workers=given.workers,
        device=given.device,
        compiled=given.compiled,
        start=given.start,
    )
    # The model classes are imported after this, so that they find mamba_ssm's kernels.
    prepare_libraries()
    from tiny.training.loop import train

    evaluation = train(settings)
    if evaluation is not None:
        print(json.dumps(evaluation))
    return 0


if __name__ == "__main__":
    main(_run)
