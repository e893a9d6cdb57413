"""Finds the EVS rate of a checkpoint: accuracy, time to the first token and load at several rates.

    python -m serve.sweep DIR --rates 0,0.5,0.75,0.9 --out sweep
    python -m serve.sweep BF16_DIR FP8_DIR --data clips.jsonl --tolerance 1 --out sweep
    python -m serve.sweep DIR --tasks video_event --items 150 --concurrency 1,8 --out sweep

Each directory is served at each rate and asked the same items, first one --concurrency, then the
next. Items are test items of tiny's tasks, made for the tiny checkpoint, or the lines of --data:
{"messages": [...], "answer": "..."} with paths of clips in the messages. An answer counts when it
is exact. The server keeps nothing of a clip that it has seen, so every request is measured whole.

Recommended is the highest rate whose loss of accuracy against rate 0 is inside --tolerance: the
upper end of the paired 95 % interval must be, and, with few items, the three hundredths of a rule
of three. A rate that was measured with the same settings is not measured again: the same command
goes on after a stop, and another rate may be added.

Exit status: 0 measured, 1 a server ended or answered nothing, 2 bad input.

--out gets sweep.json, sweep.svg, sweep.png, and measured.json, from which the command goes on.
sweep.json is an object:
  command, vllm, device, tasks (list), items, tolerance, concurrency (list), max_tokens
  measured     list of {directory, precision, rate, items, accuracy, loss, loss_low, loss_high,
               empty, prompt_tokens_mean}: accuracy is a share, the mean over the tasks; the loss
               against rate 0 and its 95 % interval are in points, worse is positive
  tasks_measured  list of {directory, rate, task, items, accuracy, loss, loss_low, loss_high}
  load         list of {directory, rate, concurrency, requests, failed, ttft_ms_median, ttft_ms_p99,
               requests_per_s, output_tokens_per_s}
  recommended  list of {directory, rate, sentences (list)}
  warnings     list of sentences
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint import atomic
from checkpoint.command import command_parser, parse_command
from checkpoint.config import read_config
from checkpoint.faults import (
    BadInput,
    Fault,
    main,
    raise_if_any,
    raise_on_termination,
    shortened,
)
from checkpoint.log import get_logger
from checkpoint.naming import directory_names
from checkpoint.video import parse_rates
from serve.__main__ import split_extra
from serve.bench import concurrencies
from serve.bench_runs import BenchFailed
from serve.environment import ServeEnvironment, environment_and_flags
from serve.options import add_setting_options, given_settings
from serve.precision import precision_name
from serve.preflight import checked_settings, directory_faults, preflight, token_faults
from serve.process import ServerDied
from serve.recorded_command import shown_command
from serve.settings import ServeSettings, override
from serve.sweep_figure import draw
from serve.sweep_items import (
    VIDEO_TASKS,
    ItemClip,
    Items,
    check_media,
    count_frames,
    data_items,
    length_faults,
    short_clip_warning,
    still_warning,
    task_items,
)
from serve.sweep_points import MEASURED_FILE, WITHOUT_CACHE, measure_all
from serve.sweep_result import result_of, tables
from serve.vllm_flags import flags_after, setting_values
from serve.workloads import NEEDED, check_packages

logger = get_logger("serve.sweep")

ITEMS = 150
"""Items of each task where --items is not given."""

MOST_ITEMS = 10_000
"""Items of a task at most: all are drawn and encoded before the first server starts."""

RESULT_FILES = ("sweep.json", "sweep.svg", "sweep.png", MEASURED_FILE)

SETTINGS = (
    *("video.fps", "video.max_frames", "max_model_len", "max_images", "max_videos"),
    *("gpu_memory_utilization", "tensor_parallel_size"),
)
"""Settings of the servers that the command line may change."""


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("serve.sweep", __doc__)
    directories_help = "checkpoint directories, such as BF16, FP8 and NVFP4"
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help=directories_help)
    rates_help = "EVS rates, separated by commas; 0 is always measured (default: 0,0.5,0.75,0.9)"
    parser.add_argument("--rates", default="0,0.5,0.75,0.9", metavar="Q,…", help=rates_help)
    data_help = "JSON Lines file of clips with answers, instead of tiny's tasks"
    parser.add_argument("--data", type=Path, metavar="FILE", help=data_help)
    tasks_help = f"tiny's tasks, separated by commas (default: {','.join(VIDEO_TASKS)})"
    parser.add_argument("--tasks", metavar="NAME,…", help=tasks_help)
    items_help = f"items of each of tiny's tasks (default: {ITEMS})"
    parser.add_argument("--items", type=int, metavar="N", help=items_help)
    tolerance_help = "largest loss of accuracy in points (default: 2)"
    parser.add_argument("--tolerance", type=float, default=2.0, metavar="P", help=tolerance_help)
    concurrency_help = "requests at a time, separated by commas (default: 1,8)"
    parser.add_argument("--concurrency", default="1,8", metavar="N,…", help=concurrency_help)
    tokens_help = "most tokens of an answer (default: 24)"
    parser.add_argument("--max-tokens", type=int, default=24, metavar="N", help=tokens_help)
    out_help = "folder of the results (default: sweep)"
    parser.add_argument("--out", type=Path, default=Path("sweep"), metavar="DIR", help=out_help)
    add_setting_options(parser, SETTINGS)
    return parser


def command_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse our part of a command line."""
    return parse_command(_parser(), arguments)


def rates_with_none(text: str) -> list[float]:
    """Parse `0.5,0.75`; 0, which drops nothing, is added if it is not there.

    Raises:
        BadInput: A part is not a rate, or has more digits than the results show.
    """
    rates = parse_rates(text, "--rates")
    for rate in rates:
        if float(f"{rate:g}") != rate:
            what = f"has {rate!r}, of more than six digits"
            raise BadInput(Fault("--rates", what, "give a rounded rate"))
    return sorted({0.0, *rates})


def _check(
    options: argparse.Namespace, flags: Sequence[str], environment: ServeEnvironment
) -> None:
    """Check the options and the directories.

    Raises:
        BadInput: With every fault.
    """
    faults = []
    if options.items is not None and not 1 <= options.items <= MOST_ITEMS:
        faults.append(Fault("--items", f"is {options.items}", f"give 1 to {MOST_ITEMS:,}"))
    if options.max_tokens < 1:
        faults.append(Fault("--max-tokens", f"is {options.max_tokens}", "give 1 or more"))
    if not 0 < options.tolerance <= 100:
        what = f"is {options.tolerance}"
        faults.append(Fault("--tolerance", what, "give points of accuracy, above 0, at most 100"))
    for name in ("tasks", "items"):
        if options.data is not None and getattr(options, name) is not None:
            faults.append(Fault(f"--{name}", "does nothing with --data", "leave one of them out"))
    if "video.pruning_rate" in setting_values(flags):
        faults.append(Fault("--video-pruning-rate", "would fix the rate", "give --rates"))
    # Unlike resolve(), realpath() leaves a circle of links to the faults of the directory.
    paths = [Path(os.path.realpath(directory)) for directory in options.directories]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        faults.append(Fault(str(path), "is given more than once", "give it once"))
    for directory in options.directories:
        faults += directory_faults(directory, environment)
    raise_if_any(faults)


def _items(options: argparse.Namespace) -> Items:
    if options.data is not None:
        return data_items(options.data)
    if options.tasks is None:
        names = list(VIDEO_TASKS)
    else:
        names = [name for name in options.tasks.split(",") if name]
    if not names:
        raise BadInput(Fault("--tasks", "names no task", f"such as {','.join(VIDEO_TASKS)}"))
    return task_items(names, options.items or ITEMS)


def _check_servers(
    options: argparse.Namespace,
    flags: Sequence[str],
    rates: Sequence[float],
    environment: ServeEnvironment,
) -> ServeSettings:
    """Check every directory at every rate, before the first is served.

    Returns:
        How the first directory is served.

    Raises:
        BadInput: With every fault of a directory.
    """
    overrides = given_settings(options) | {"port": 0}
    faults: list[Fault] = []
    found = []
    for directory in options.directories:
        try:
            settings = checked_settings(directory, overrides, flags, environment)
            for rate in rates:
                at_rate = override(settings, {"video.pruning_rate": rate})
                preflight(directory, at_rate, environment, flags_after(WITHOUT_CACHE, flags))
            faults += token_faults("--max-tokens", options.max_tokens, directory, settings)
            found.append(settings)
        except BadInput as bad:
            faults += bad.faults
    raise_if_any(faults)
    return found[0]


def _check_out(out: Path) -> None:
    """Check that the results can be written.

    Raises:
        BadInput: They cannot, or the folder is a checkpoint.
    """
    if (out / "config.json").exists():
        # Its own files would count as files of the checkpoint.
        raise BadInput(Fault(shortened(out), "is a checkpoint", "give another --out"))
    for name in RESULT_FILES:
        if (out / name).is_dir():
            raise BadInput(Fault(shortened(out / name), "is a directory", "give another --out"))
    atomic.check_writable(out)


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status.

    Args:
        arguments: The command line without the program's name.

    Raises:
        BadInput: With the faults of the options, the directories or the items.
    """
    raise_on_termination()
    ours, given = split_extra(arguments)
    options = command_options(ours)
    check_packages((*NEEDED, "matplotlib"))
    environment, (flags,) = environment_and_flags(given)
    _check(options, flags, environment)
    rates = rates_with_none(options.rates)
    counts = concurrencies(options.concurrency)
    items = _items(options)
    settings = _check_servers(options, flags, rates, environment)
    check_media(items, settings)
    clips = count_frames(items, settings.video)
    first = options.directories[0]
    raise_if_any(length_faults(items, clips, first, settings, options.max_tokens))
    warnings = _warnings(items, clips, rates)
    was_there = options.out.exists()
    _check_out(options.out)
    try:
        points = measure_all(options, flags, items, rates, environment)
    except (ServerDied, BenchFailed) as failed:
        logger.error("%s", failed)
        if not was_there:
            with contextlib.suppress(OSError):  # it holds what was measured before
                options.out.rmdir()
        return 1
    precisions = {}
    names = directory_names(options.directories)
    for name, directory in zip(names, options.directories, strict=True):
        precisions[name] = precision_name(read_config(directory))
    result = {
        "command": shown_command("serve.sweep", arguments),
        "vllm": environment.version,
        "device": environment.device.name,
        "tasks": list(items),
        "items": sum(len(asked) for asked in items.values()),
        "tolerance": options.tolerance,
        "concurrency": counts,
        "max_tokens": options.max_tokens,
        **result_of(points, precisions, items, options.tolerance),
        "warnings": warnings,
    }
    atomic.write_json(options.out / "sweep.json", result)
    draw(result, options.out)
    _show(result)
    return 0


def _warnings(items: Items, clips: Sequence[ItemClip], rates: Sequence[float]) -> list[str]:
    """Return, and log, why the items may say little about a rate."""
    found = [still_warning(items, clips)]
    for rate in rates:
        found.append(short_clip_warning(clips, rate))
    warnings = [warning for warning in found if warning is not None]
    for warning in warnings:
        logger.warning("%s", warning)
    return warnings


def _show(result: Mapping[str, Any]) -> None:
    """Print the tables and the recommended rates."""
    from rich.console import Console

    console = Console()
    for shown in tables(result):
        console.print(shown)
    for row in result["recommended"]:
        option = f"--video-pruning-rate {row['rate']:g}"
        print(f"{row['directory']}: recommended EVS rate {row['rate']:g} ({option})")
        for sentence in row["sentences"]:
            print(f"  {sentence}")


if __name__ == "__main__":
    main(lambda: run(sys.argv[1:]))
