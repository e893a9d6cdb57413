"""Compares a directory, or a server, with BF16 on the tasks: a paired table with 95 % intervals.

    python -m accuracy DIR --reference BF16_DIR [--tasks document,chart] [--items 300]
    [--video-pruning-rate 0.75]
    python -m accuracy DIR --reference DIR --endpoint http://localhost:8000     # served against in
    process

Both sides answer the same held-out items greedily; an answer counts when it is exact. DIR is read
back from its files, weights dequantized and inputs rounded as served. With --endpoint the server
answers in DIR's place. Exit status: 0 measured, 2 bad input, also when too many requests fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from rich.console import Console

from checkpoint.config import read_config
from checkpoint.faults import BadInput, Fault, main
from tiny.tasks import TASKS, TEST_ITEMS, check_tasks, items


def _run() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m accuracy", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--reference", type=Path, required=True, metavar="BF16_DIR")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, separated by commas")
    parser.add_argument("--items", type=int, default=TEST_ITEMS, help="items a task")
    parser.add_argument(
        "--video-pruning-rate",
        type=float,
        default=0.0,
        help="EVS rate in process; a server has its own",
    )
    parser.add_argument("--endpoint", metavar="URL", help="ask this server instead of DIR's files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    names = [name for name in arguments.tasks.split(",") if name]
    check_tasks(names)
    if not names:
        raise BadInput(Fault("--tasks", "names no task", f"choose from {', '.join(TASKS)}"))
    configs = [read_config(directory) for directory in (arguments.reference, arguments.directory)]
    samples = {name: items(name, count=arguments.items) for name in names}

    # torch is imported only now: a misspelt task need not wait for it.
    from accuracy.answers import answer_tasks
    from accuracy.endpoint import ask_endpoint
    from accuracy.paired import pair, paired_table

    rate = arguments.video_pruning_rate
    if arguments.endpoint:
        variant: dict[str, list[str | None]] = ask_endpoint(arguments.endpoint, samples)
    else:
        variant = dict(answer_tasks(configs[1], samples, rate))
    rows = pair(samples, answer_tasks(configs[0], samples, rate), variant)
    Console().print(
        paired_table(rows, arguments.reference.name, arguments.endpoint or arguments.directory.name)
    )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    main(_run)
