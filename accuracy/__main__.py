"""Compares a directory, or a server, with BF16 on the tasks: a paired table with 95 % intervals.

    python -m accuracy DIR --reference BF16_DIR [--tasks document,chart] [--items 300]
    python -m accuracy DIR --reference BF16_DIR --endpoint http://localhost:8000
    python -m accuracy DIR [DIR …] --reference BF16_DIR --suite report [--limit N]

Both sides answer the same held-out items greedily; an answer counts when it is exact. DIR is read
back from its files, weights dequantized and inputs rounded as served. Clips are sampled and pruned
as DIR's manifest says, as its server does. With --endpoint the server answers in DIR's place; give
--video-pruning-rate if it was started with another rate. With --suite each directory is served in
turn and answers published benchmarks: see docs/accuracy.md. Exit status: 0 measured, and every gate
of a suite passed; 1 a gate was missed; 2 bad input, also when too many requests fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from accuracy.suites.command import add_options, options_without_suite, run_suite
from checkpoint.atomic import check_result_file, write_text
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import BadInput, Fault, main, raise_if_any
from checkpoint.libraries import prepare_libraries
from checkpoint.log import get_logger
from checkpoint.naming import directory_names
from checkpoint.video import Video
from checkpoint.weight_files import checkpoint_faults
from tiny.tasks import TASKS, TEST_ITEMS, check_tasks, items

logger = get_logger("accuracy")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("accuracy", __doc__)
    directories_help = "what is compared; several with --suite"
    parser.add_argument("directories", type=Path, metavar="DIR", nargs="+", help=directories_help)
    parser.add_argument("--reference", type=Path, required=True, metavar="BF16_DIR")
    parser.add_argument("--tasks", help="names, separated by commas (default: all)")
    parser.add_argument("--items", type=int, default=TEST_ITEMS, help="items per exact task")
    parser.add_argument(
        "--video-pruning-rate", type=float, metavar="Q", help="EVS rate (DIR's manifest)"
    )
    parser.add_argument("--endpoint", metavar="URL", help="ask this server instead of DIR's files")
    parser.add_argument("--api-key", metavar="KEY", help="the server's key (VLLM_API_KEY)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    add_options(parser)
    return parser


def compared_video(directory: Path, override: float | None) -> Video:
    """Return how clips are seen in a comparison: as the manifest says, or at another rate.

    Args:
        directory: A checkpoint. Without a manifest, as for BF16, the defaults hold, as in serving.
        override: EVS rate of the command line.

    Raises:
        BadInput: The rate is out of range, or the manifest cannot be read.
    """
    from export.manifest import read_manifest

    manifest = read_manifest(directory)
    video = manifest.video if manifest else Video()
    if override is None or override == video.pruning_rate:
        return video
    if not 0 <= override < 1:
        remedy = "give 0 (off) up to but not including 1"
        raise BadInput(Fault("--video-pruning-rate", f"is {override}", remedy))
    if manifest:
        logger.warning(
            "%s was calibrated at EVS rate %g and is compared at %g",
            directory,
            video.pruning_rate,
            override,
        )
    return video.with_rate(override)


def _run() -> int:
    arguments = parse_command(_parser())
    if arguments.suite is not None:
        return run_suite(arguments, compared_video)
    raise_if_any(options_without_suite(arguments))
    if len(arguments.directories) > 1:
        raise BadInput(Fault("DIR", "is given more than once", "give one, or --suite"))
    directory = arguments.directories[0]
    if arguments.tasks is None:
        arguments.tasks = ",".join(TASKS)
    names = [name for name in arguments.tasks.split(",") if name]
    check_tasks(names)
    if not names:
        raise BadInput(Fault("--tasks", "names no task", f"choose from {', '.join(TASKS)}"))
    raise_if_any(_first_faults(arguments, directory))
    video = compared_video(directory, arguments.video_pruning_rate)
    if arguments.json:
        check_result_file(arguments.json)
    samples = {name: items(name, count=arguments.items) for name in names}
    # torch and ModelOpt are imported only now, so that a misspelt task is reported at once.
    prepare_libraries()
    from accuracy.answers import answer_tasks
    from accuracy.endpoint import ask_endpoint
    from accuracy.paired import pair, paired_table
    from checkpoint.opened import open_checkpoint, rounding_note

    reference = open_checkpoint(arguments.reference)
    variant = open_checkpoint(directory)
    rounded = rounding_note(reference)
    if rounded is not None:
        logger.info("%s", rounded)
    logger.info("clips: %s", video)
    if arguments.endpoint:
        answers = ask_endpoint(arguments.endpoint, samples, api_key=arguments.api_key)
    else:
        answers = answer_tasks(variant, samples, video)
    rows = pair(samples, answer_tasks(reference, samples, video), answers)
    names = directory_names([arguments.reference, directory])
    Console().print(paired_table(rows, names[0], arguments.endpoint or names[1]))
    if arguments.json:
        plain = [dataclasses.asdict(row) for row in rows]
        write_text(arguments.json, json.dumps(plain, indent=2) + "\n")
    return 0


def _first_faults(arguments: argparse.Namespace, directory: Path) -> Iterator[Fault]:
    """Yield what can be told of the command line and both checkpoints without torch."""
    if arguments.items < 1:
        yield Fault("--items", f"is {arguments.items}", "give at least 1")
    for path in (arguments.reference, directory):
        yield from checkpoint_faults(path)


if __name__ == "__main__":
    main(_run)
