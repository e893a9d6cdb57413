"""Compares the answers of a checkpoint that is split over several GPUs with those of one GPU.

    python -m benchmarks.tensor_parallel DIR … --json FILE

Each DIR is served on one GPU and on --ranks (on a CPU: processes), all servers at once, by
`python -m serve`'s way, and vLLM's log must say so. Asked greedily: the demo's questions about a
list, a page, pictures and a clip, and a long prompt. The tiny checkpoint and its exports have
answers that are known.

Exit status: 0 all answers are there, right, and the same; 1 otherwise.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paired_servers import Servers, Side
from benchmarks.parts import write_json
from benchmarks.plain_vllm import asked, faults_of
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import main
from checkpoint.log import get_logger
from serve.environment import find_environment
from serve.settings import ServeSettings

logger = get_logger(__name__)

GPU_FLAGS = ("--gpu-memory-utilization", "0.12", "--kv-cache-memory-bytes", "2000000000")
"""For several servers of a checkpoint of a few MB on one GPU."""


_RANKS = re.compile(r"tensor_parallel_size=(\d+)")


def ranks_of(log: str) -> int | None:
    """Return over how many ranks vLLM says that it has split a model; None if it does not say."""
    said = _RANKS.search(log)
    return int(said[1]) if said else None


def differences(one: dict[str, Any], several: dict[str, Any]) -> list[str]:
    """Return the titles of questions that two servers answer otherwise.

    Args:
        one: From `plain_vllm.asked`.
        several: The same.
    """
    return [title for title in one if one[title].get("text") != several[title].get("text")]


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.tensor_parallel", __doc__)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="a checkpoint")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    parser.add_argument("--ranks", type=int, default=2, help="GPUs (default: 2)")
    parser.add_argument("--vllm", default="", metavar="FLAGS", help="more flags of vllm serve")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer (default: 32)")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status.

    Raises:
        BadInput: A directory has faults, or there are fewer GPUs.
    """
    options = parse_command(_parser(), arguments)
    environment = find_environment()
    shared = GPU_FLAGS if environment.device.kind == "cuda" else ()
    flags = (*shared, "--max-num-seqs", "16", *shlex.split(options.vllm))
    split = ("--tensor-parallel-size", str(options.ranks))
    sides = []
    for directory in options.directories:
        sides.append(Side(f"{directory.name}, one", directory, flags))
        sides.append(Side(f"{directory.name}, split", directory, (*flags, *split)))
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.tensor_parallel", *arguments]),
        "device": f"{options.ranks} × {environment.device.name}",
        "vllm": environment.version,
        "servers": [side.described() for side in sides],
    }
    write_json(options.json, result)
    answers: dict[str, Any] = {}
    ranks: dict[str, int | None] = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        Servers(ServeSettings(), environment) as servers,
    ):
        servers.start(sides)
        for name, asker in servers.askers.items():
            answers[name] = asked(asker, Path(scratch), options.max_tokens, lambda _: None)
            ranks[name] = ranks_of(asker.log_text())
    faults = [f"{name} did not start: {why}" for name, why in servers.failed.items()]
    for name, found_ranks in ranks.items():
        wanted = options.ranks if name.endswith(", split") else 1
        if found_ranks != wanted:
            faults.append(f"{name}: vLLM says that it runs on {found_ranks}, not on {wanted}")
    for name, found in answers.items():
        faults += [f"{name}: {fault}" for fault in faults_of(found, must_be_right=True)]
    for directory in options.directories:
        both = [answers.get(f"{directory.name}, {kind}") for kind in ("one", "split")]
        if both[0] is not None and both[1] is not None:
            for title in differences(both[0], both[1]):
                faults.append(f"{directory.name}: {title} is answered otherwise when split")
    write_json(options.json, result | {"ranks": ranks, "answers": answers, "faults": faults})
    for fault in faults:
        logger.error("%s", fault)
    return 1 if faults else 0


if __name__ == "__main__":
    main(lambda: run(sys.argv[1:]))
