"""Measures what ReplaySSM and a 16-bit Mamba state cost in accuracy: served, the same items asked.

    python -m benchmarks.state_accuracy DIR … --json FILE                  # on a GPU
    python -m benchmarks.state_accuracy DIR --json FILE --ways "float16 state"     # on a CPU

ReplaySSM is a Triton kernel, so that a CPU can show a 16-bit state alone, which is rounded at every
token there.

Each DIR, a tiny checkpoint or an export of it, is served with the state in float32, which is the
reference, and in each of the ways; all its servers run at once. Intervals are paired 95 % intervals
of the difference from the reference. Beside answers, which are short, each server continues texts
for --tokens tokens: how many of these are the reference's up to the first that is not.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accuracy.endpoint import ask_endpoint
from accuracy.paired import pair
from benchmarks.answers import described, differing
from benchmarks.paired_servers import Asker, Servers, Side
from benchmarks.parts import Parts, write_json
from calibrate.samples import Sample
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import BadInput, Fault, main, raise_if_any
from checkpoint.log import get_logger
from serve.environment import ServeEnvironment, find_environment
from serve.settings import ServeSettings
from serve.state_update import STATE_FLAG
from tiny.tasks import TASKS, check_tasks, items

logger = get_logger(__name__)

REFERENCE = "float32 state"

_FLOAT16 = (STATE_FLAG, "float16")
_FLOAT32 = (STATE_FLAG, "float32")
_REPLAY = {"replayssm": "true"}

WAYS: Mapping[str, tuple[tuple[str, ...], Mapping[str, str]]] = {
    REFERENCE: (_FLOAT32, {}),
    "float16 state": (_FLOAT16, {}),
    "ReplaySSM, float32 state": (_FLOAT32, _REPLAY),
    "ReplaySSM, float16 state": (_FLOAT16, _REPLAY),
}
"""Flags of vLLM and settings of ours, by way."""

GPU_FLAGS = ("--gpu-memory-utilization", "0.15", "--kv-cache-memory-bytes", "4000000000")
"""For several servers of a checkpoint of a few MB on one GPU."""

TEXTS = 32
"""Texts that are continued."""


def sides_of(
    directory: Path, ways: Sequence[str], flags: Sequence[str], environment: ServeEnvironment
) -> list[Side]:
    """Return a server for each way.

    Args:
        directory: A checkpoint.
        ways: Names among `WAYS`.
        flags: More flags of vLLM.
        environment: Where vLLM is.
    """
    shared = GPU_FLAGS if environment.device.kind == "cuda" else ()
    found = []
    for way in ways:
        own, settings = WAYS[way]
        found.append(
            Side(way, directory, (*shared, "--max-num-seqs", "64", *flags, *own), settings)
        )
    return found


def answers_of(
    asker: Asker, samples: Mapping[str, Sequence[Sample]], tokens: int
) -> dict[str, Any]:
    """Let a server answer all items and continue the texts, greedily.

    Returns:
        `answers` by task, and `texts`: the continuations as token ids.
    """
    texts = [
        asker.continue_text(f"The story of number {number}:", tokens) for number in range(TEXTS)
    ]
    return {"answers": ask_endpoint(asker.url, samples), "texts": texts}


def equal_tokens(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many entries are equal up to the first that is not."""
    count = 0
    for left, right in zip(one, other):
        if left != right:
            break
        count += 1
    return count


def compared(
    samples: Mapping[str, Sequence[Sample]], found: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Compare each way with the reference.

    Args:
        samples: Items by task.
        found: `answers_of` by way.

    Returns:
        By way: `tasks`, rows of `accuracy.paired`; `differing`, answers that are not the
        reference's, by task; `equal_tokens`, the median and the least of the continuations;
        `equal_texts`, how many of these are equal to the end.
    """
    reference = found[REFERENCE]
    rows: dict[str, Any] = {}
    for way, own in found.items():
        if way == REFERENCE:
            continue
        texts = list(zip(reference["texts"], own["texts"]))
        equal = [equal_tokens(one, two) for one, two in texts]
        paired = pair(samples, reference["answers"], own["answers"])
        rows[way] = {
            "tasks": [described(row) for row in paired],
            "differing": differing(reference["answers"], own["answers"]),
            "equal_tokens": {"median": statistics.median(equal), "least": min(equal)},
            "equal_texts": [one == two for one, two in texts].count(True),
        }
    return rows


def measure(
    directory: Path,
    ways: Sequence[str],
    flags: Sequence[str],
    samples: Mapping[str, Sequence[Sample]],
    tokens: int,
    parts: Parts,
) -> dict[str, Any]:
    """Serve a checkpoint in all ways at once, ask, and compare.

    A way whose server does not start is named in place of its figures.

    Args:
        directory: A checkpoint.
        ways: Names among `WAYS`, the reference among them.
        flags: More flags of vLLM.
        samples: Items by task.
        tokens: Of a continuation.
        parts: Keeps what each way has answered.
    """
    environment = find_environment()
    failed: dict[str, Any] = {}
    found: dict[str, Any] = {}
    names = {way: f"{directory.name}: {way}" for way in ways}
    todo = [way for way in ways if parts.get(names[way]) is None]
    with Servers(ServeSettings(), environment) as servers:
        if todo:
            servers.start(sides_of(directory, todo, flags, environment))
        work: dict[str, Callable[[], dict[str, Any]]] = {}
        for way in todo:
            if way in servers.failed:
                failed[way] = {"not_started": servers.failed[way]}
                continue
            work[names[way]] = partial(answers_of, servers.askers[way], samples, tokens)
        # A CPU answers no faster when it is asked by several.
        at_once = len(ways) if environment.device.kind == "cuda" else 1
        parts.all(work, at_once)
        for way in ways:
            if way not in failed:
                found[way] = parts.get(names[way])
    if REFERENCE not in found:
        return failed
    return compared(samples, found) | failed


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.state_accuracy", __doc__)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="a checkpoint")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    others = ",".join(way for way in WAYS if way != REFERENCE)
    parser.add_argument("--ways", default=None, help=f"separated by ; (default: {others})")
    parser.add_argument("--items", type=int, default=300, help="of each task (300)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="(default: all)")
    parser.add_argument("--tokens", type=int, default=256, help="of a continuation (256)")
    parser.add_argument("--vllm", default="", metavar="FLAGS", help="more flags of vllm serve")
    return parser


def _ways(text: str | None) -> list[str]:
    """Return the ways that are asked for, the reference first.

    Raises:
        BadInput: One is not known.
    """
    if text is None:
        return list(WAYS)
    named = [way.strip() for way in text.split(";") if way.strip()]
    known = f"among {'; '.join(WAYS)}"
    raise_if_any(Fault("--ways", f"has {way!r:.80}", known) for way in named if way not in WAYS)
    return list(dict.fromkeys([REFERENCE, *named]))


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status: 1 if a server did not start.

    Raises:
        BadInput: The options or a directory have faults.
    """
    options = parse_command(_parser(), arguments)
    ways = _ways(options.ways)
    if options.items < 1 or options.tokens < 1:
        raise BadInput(Fault("--items, --tokens", "below 1", "give 1 or more"))
    tasks = [task for task in options.tasks.split(",") if task]
    check_tasks(tasks)
    environment = find_environment()
    samples = {task: items(task, "test", options.items) for task in tasks}
    settings = {"items": options.items, "tasks": tasks, "tokens": options.tokens}
    parts = Parts(
        options.json.with_suffix(".partial.json"), settings | {"device": environment.device.name}
    )
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.state_accuracy", *arguments]),
        "device": environment.device.name,
        "vllm": environment.version,
        "against": REFERENCE,
        "checkpoints": {},
    }
    write_json(options.json, result)
    for directory in options.directories:
        flags = shlex.split(options.vllm)
        rows = measure(directory, ways, flags, samples, options.tokens, parts)
        result["checkpoints"][directory.name] = rows
        write_json(options.json, result)
    all_rows = [row for rows in result["checkpoints"].values() for row in rows.values()]
    return 1 if any("not_started" in row for row in all_rows) else 0


if __name__ == "__main__":
    main(lambda: run(sys.argv[1:]))
