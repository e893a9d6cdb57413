"""Measures decoding and prefill of two servers on one GPU, in turn.

    python -m benchmarks.decode DIR --json FILE                       # stock vLLM against ours
    python -m benchmarks.decode DIR --json FILE --set replayssm=true
    python -m benchmarks.decode DIR --json FILE --baseline ours --baseline-dir OTHER --env NAME=1
    python -m benchmarks.decode DIR --json FILE --variant "replay: --set replayssm=true" \
        --variant "float16 state: --flags='--mamba-ssm-cache-dtype float16'"

The baseline is `vllm serve DIR` with nothing of ours in front (`--baseline stock`), or what
`python -m serve` starts (`--baseline ours`); the other server is always ours. All get the flags of
--vllm. DIR may be what `benchmarks.unweighted` writes.

With --variant there are several of ours, each with --set, --env and --flags of its own. They are
started one after the other beside the baseline, which goes on running, and each is measured in turn
with it. One that does not start is named, and the next one follows.

Each request is a prompt of random tokens that no server has seen, and its answer comes in one piece
and has a fixed number of tokens, so that neither text nor sampling matters:

  decode    N requests at once, once for one token and once for --tokens: the difference in time is
            that of decoding alone; tokens per second of all requests together
  prefill   one request for one token: seconds

After a warm-up the two servers take turns, each pair of runs in the other order, and the ratio of
each pair is taken. Everything ends --seconds after the command, start-up included; parts that no
time is left for are named. The file is written again after every part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.paired_servers import (
    Asker,
    Measured,
    Servers,
    Side,
    measured_with,
    random_prompts,
)
from benchmarks.parts import write_json
from benchmarks.serving import read_log
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import BadInput, Fault, main, raise_if_any
from checkpoint.log import get_logger
from serve.environment import Device, find_environment
from serve.settings import ServeSettings
from serve.state_update import FOLDER_VARIABLE

logger = get_logger(__name__)

BASELINE = "baseline"
OURS = "ours"

ATTEMPTS = 3
"""Times that decoding is timed where something else has held one token up."""

SHORT_PROMPT = 32
"""Tokens of the prompts that decoding is measured after."""

GPU_FLAGS = ("--gpu-memory-utilization", "0.45", "--kv-cache-memory-bytes", "16000000000")
"""For two servers on one GPU of 80 GB. The size of the cache is given, because servers that start
at once count each other's memory as their own while they look for what is left."""

STOCK_FLAGS = ("--trust-remote-code",)
STOCK_VARIABLES = {"VLLM_PLUGINS": "", FOLDER_VARIABLE: ""}
"""Stock vLLM: no plug-in, so that it needs the checkpoint's code, and no configuration of ours."""

LEAST_SECONDS_LEFT = 20.0
"""A part is begun only when so much time is left."""

_LOG_LINES = re.compile(
    r".*(?:Using SSM config|default Mamba SSU|GPU KV cache size|Maximum concurrency|ReplaySSM"
    r"|Model Runner V|hybridquant|mamba_ssm_cache_dtype|Available KV cache memory|init engine"
    r"|attention block size|Initial free memory).*"
)
"""Lines of vLLM's log that say how it decodes, and what memory it has."""


def numbers(text: str, option: str) -> list[int]:
    """Parse `1,64`; "" is an empty list.

    Raises:
        BadInput: A part is not a number of 1 or more.
    """
    found = []
    for part in filter(None, text.split(",")):
        if not part.strip().isdecimal() or int(part) < 1:
            remedy = "give numbers of 1 or more, such as 1,64"
            raise BadInput(Fault(option, f"is {text!r:.80}", remedy))
        found.append(int(part))
    return found


def pairs(words: Sequence[str], option: str) -> dict[str, str]:
    """Parse `NAME=VALUE` of each word.

    Raises:
        BadInput: A word has no `=`.
    """
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise BadInput(Fault(option, f"is {word!r:.80}", "give NAME=VALUE"))
        found[name] = value
    return found


def sides_of(options: argparse.Namespace, device: Device) -> tuple[Side, list[Side]]:
    """Return the baseline, and ours: one, or each --variant.

    Raises:
        BadInput: A variant or a variable is not written as it must be.
    """
    shared = [*GPU_FLAGS] if device.kind == "cuda" else []
    # vLLM ends where its cache has fewer blocks than its default of 1,024 sequences.
    most = max([1, *numbers(options.concurrency, "--concurrency")])
    shared += ["--max-num-seqs", str(most), *shlex.split(options.vllm)]
    is_plain = options.baseline == "stock"
    baseline = Side(
        BASELINE,
        options.baseline_dir or options.directory,
        (*(STOCK_FLAGS if is_plain else ()), *shared, *shlex.split(options.baseline_flags)),
        pairs(options.baseline_set, "--baseline-set"),
        (STOCK_VARIABLES if is_plain else {}) | pairs(options.baseline_env, "--baseline-env"),
        is_plain,
    )
    given = variants(options.variant) or {OURS: options}
    ours = []
    for name, chosen in given.items():
        flags = (*shared, *shlex.split(chosen.flags))
        settings, variables = pairs(chosen.set, "--set"), pairs(chosen.env, "--env")
        ours.append(Side(name, options.directory, flags, settings, variables))
    return baseline, ours


def variants(words: Sequence[str]) -> dict[str, argparse.Namespace]:
    """Parse `NAME: OPTIONS` of each word.

    Returns:
        `set`, `env` and `flags` by name.

    Raises:
        BadInput: A word has no name, a name comes twice or is the baseline's, or the options are
            not known.
    """
    found: dict[str, argparse.Namespace] = {}
    parser = argparse.ArgumentParser("--variant", add_help=False, exit_on_error=False)
    _add_ours(parser)
    for word in words:
        name, colon, rest = word.partition(":")
        name = name.strip()
        if not colon or not name or name == BASELINE or name in found:
            remedy = 'give a name of its own and options, as "replay: --set replayssm=true"'
            raise BadInput(Fault("--variant", f"is {word!r:.80}", remedy))
        try:
            chosen, unknown = parser.parse_known_args(shlex.split(rest))
        except (argparse.ArgumentError, ValueError) as error:
            remedy = "its options are --set, --env and --flags"
            raise BadInput(Fault(f"--variant {name}", str(error), remedy)) from None
        if unknown:
            what = f"has {unknown[0]!r:.80}"
            remedy = "its options are --set, --env and --flags"
            raise BadInput(Fault(f"--variant {name}", what, remedy))
        found[name] = chosen
    return found


def _add_ours(parser: argparse.ArgumentParser) -> None:
    """Add the options of one of our servers."""
    parser.add_argument("--flags", default="", metavar="FLAGS", help="flags for ours")
    parser.add_argument("--env", nargs="*", default=[], metavar="NAME=VALUE", help="for ours")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of ours"
    )


def decode_rate(asker: Asker, count: int, tokens: int, seed: int) -> float:
    """Return the tokens per second that a server writes for `count` requests together.

    Args:
        asker: The server.
        count: Requests at once.
        tokens: Of each answer, 2 or more.
        seed: Of the prompts, which no run may have had before.

    Raises:
        OSError: A request fails, or more tokens did not take longer.
    """
    for attempt in range(ATTEMPTS):
        number = 2 * (ATTEMPTS * seed + attempt)
        first = asker.complete_all(random_prompts(count, SHORT_PROMPT, number), 1)
        whole = asker.complete_all(random_prompts(count, SHORT_PROMPT, number + 1), tokens)
        if whole > first:
            return count * (tokens - 1) / (whole - first)
    raise OSError(f"{tokens} tokens took no longer than one: the machine is too busy")


def prefill_seconds(asker: Asker, tokens: int, seed: int) -> float:
    """Return the seconds until the first token after a prompt of `tokens` tokens."""
    (prompt,) = random_prompts(1, tokens, seed)
    return asker.complete(prompt, 1)


def in_turn(
    askers: dict[str, Asker],
    run: Callable[[Asker, int], float],
    repeats: int,
    more_is_better: bool,
    end: float,
    warms_up: bool = True,
) -> Measured:
    """Measure all servers so many times, in turn.

    Args:
        askers: The servers by name.
        run: Measures once; it gets the server and a number that no other run has.
        repeats: Counted runs of each.
        more_is_better: Whether a larger figure is better; ratios are above 1 where ours is.
        end: Time, of `time.monotonic`, after which no further round is begun.
        warms_up: Whether each has a run before that is not counted.

    Returns:
        `runs` by server, `median`, and `ratio`: median, least and largest of the rounds.
    """
    if warms_up:
        for asker in askers.values():
            # The first run may compile kernels. What is really wrong shows in the next one.
            with contextlib.suppress(OSError):
                run(asker, _next_seed())
    runs: dict[str, list[float]] = {name: [] for name in askers}
    for repeat in range(repeats):
        if repeat and time.monotonic() > end:
            break
        names = list(askers) if repeat % 2 else list(askers)[::-1]
        for name in names:
            runs[name].append(run(askers[name], _next_seed()))
    found: Measured = {
        "runs": {name: [_short(value) for value in values] for name, values in runs.items()},
        "median": {name: _short(statistics.median(values)) for name, values in runs.items()},
    }
    if {BASELINE, OURS} <= set(runs):
        ratios = []
        for ours, baseline in zip(runs[OURS], runs[BASELINE]):
            ratios.append(ours / baseline if more_is_better else baseline / ours)
        found["ratio"] = {
            "median": _short(statistics.median(ratios)),
            "low": _short(min(ratios)),
            "high": _short(max(ratios)),
        }
    return found


_seeds = iter(range(1, 1_000_000))


def _next_seed() -> int:
    return next(_seeds)


def _short(value: float) -> float:
    """Round to four digits."""
    return float(f"{value:.4g}")


def measure(
    askers: dict[str, Asker],
    options: argparse.Namespace,
    end: float,
    keep: Callable[[Measured], None],
) -> Measured:
    """Measure decoding and prefill, as far as the time goes.

    Args:
        askers: The servers by name.
        options: Of the command.
        end: Time, of `time.monotonic`, after which nothing is begun.
        keep: Called with everything measured so far after each part.
    """
    parts: dict[str, tuple[Callable[[Asker, int], float], bool]] = {}
    for count in numbers(options.concurrency, "--concurrency"):
        decode = partial(_decode, count=count, tokens=options.tokens)
        parts[f"decode at {count}, tokens/s"] = (decode, True)
    for tokens in numbers(options.prompts, "--prompts"):
        parts[f"prefill of {tokens} tokens, s"] = (partial(_prefill, tokens=tokens), False)
    found: Measured = {}
    for name, (measured, more_is_better) in parts.items():
        if time.monotonic() > end - LEAST_SECONDS_LEFT:
            found[name] = "not measured: no time left"
            continue
        logger.info("%s", name)
        try:
            found[name] = in_turn(askers, measured, options.repeats, more_is_better, end)
            logger.info("%s", json.dumps({k: found[name][k] for k in found[name] if k != "runs"}))
        except OSError as error:  # refused, or too slow: the other parts are still measured
            found[name] = f"not measured: {error}"
            logger.warning("%s: %s", name, error)
        keep(found)
    return found


def _decode(asker: Asker, seed: int, count: int, tokens: int) -> float:
    return decode_rate(asker, count, tokens, seed)


def _prefill(asker: Asker, seed: int, tokens: int) -> float:
    return prefill_seconds(asker, tokens, seed)


def from_log(asker: Asker) -> dict[str, Any]:
    """Return what vLLM's log says about how it decodes."""
    log = asker.log_text()
    lines = []
    for line in log.splitlines():
        # Without process and time; each once.
        text = line.rpartition("] ")[2].strip()[:240]
        if _LOG_LINES.match(line) and text not in lines:
            lines.append(text)
    return read_log(log) | {"seconds_to_start": asker.seconds_to_start, "log": lines[:40]}


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.decode", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="the checkpoint we serve")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    parser.add_argument(
        "--baseline", choices=("stock", "ours"), default="stock", help="(default: stock)"
    )
    parser.add_argument("--baseline-dir", type=Path, metavar="DIR", help="(default: the same)")
    parser.add_argument("--vllm", default="", metavar="FLAGS", help="flags for all")
    _add_ours(parser)
    parser.add_argument(
        "--variant", action="append", default=[], metavar='"NAME: OPTIONS"', help="one of several"
    )
    parser.add_argument("--baseline-flags", default="", metavar="FLAGS", help="for the baseline")
    parser.add_argument("--baseline-set", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--baseline-env", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--concurrency", default="64,1", metavar="N,…", help="(default: 64,1)")
    parser.add_argument("--prompts", default="8192", metavar="N,…", help="tokens (default: 8192)")
    parser.add_argument("--tokens", type=int, default=384, help="of an answer (default: 384)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: 5)")
    parser.add_argument("--seconds", type=float, default=540, help="for everything (default: 540)")
    return parser


def _check(options: argparse.Namespace) -> None:
    faults = []
    if options.tokens < 2:
        faults.append(Fault("--tokens", f"is {options.tokens}", "give 2 or more"))
    if options.repeats < 1:
        faults.append(Fault("--repeats", f"is {options.repeats}", "give 1 or more"))
    for name in ("concurrency", "prompts"):
        try:
            numbers(getattr(options, name), f"--{name}")
        except BadInput as bad:
            faults += bad.faults
    raise_if_any(faults)


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status: 1 if a server did not start.

    Raises:
        BadInput: The options or a directory have faults.
    """
    begun = time.monotonic()
    options = parse_command(_parser(), arguments)
    _check(options)
    end = begun + options.seconds
    environment = find_environment()
    baseline, ours = sides_of(options, environment.device)
    about = measured_with("decode", arguments, environment) | {
        "notes": [
            "Two servers at a time share a GPU and are asked in turn; the other one is idle. "
            "Ratios are above 1 where ours is better.",
        ],
    }
    result: dict[str, Any] = about | {"baseline": baseline.described(), "variants": {}}
    for side in ours:
        result["variants"][side.name] = {"server": side.described()}
    write_json(options.json, result)  # A file that cannot be written is found at once.
    settings = ServeSettings(gpu_memory_utilization=0.45)
    with Servers(settings, environment) as servers:
        for side in ours:
            _measure_variant(servers, baseline, side, options, end, result)
            write_json(options.json, result)
    print(json.dumps(result["variants"], indent=1))
    return 1 if servers.failed else 0


def _measure_variant(
    servers: Servers,
    baseline: Side,
    side: Side,
    options: argparse.Namespace,
    end: float,
    result: dict[str, Any],
) -> None:
    """Start one of ours, and the baseline if it does not run; measure; stop ours again.

    Everything is added to `result`.

    Raises:
        BadInput: The preflight finds faults, and there is no other variant.
    """
    about = result["variants"][side.name]
    left = end - time.monotonic()
    if left < LEAST_SECONDS_LEFT:
        about["not_started"] = "no time left"
        return
    missing = [one for one in (baseline, side) if one.name not in servers.askers]
    try:
        servers.start(missing, left)
    except BadInput as bad:
        if len(result["variants"]) == 1:
            raise
        servers.failed[side.name] = str(bad)
    named = {BASELINE: baseline.name, OURS: side.name}
    askers = {as_: servers.askers[name] for as_, name in named.items() if name in servers.askers}
    if baseline.name in servers.failed:
        result["baseline"]["not_started"] = servers.failed[baseline.name]
    if BASELINE in askers:
        result["baseline"]["log"] = from_log(askers[BASELINE])
    if OURS not in askers:
        about["not_started"] = servers.failed[side.name]
        return

    def keep(found: Measured) -> None:
        about["measured"] = found
        write_json(options.json, result)

    measure(askers, options, end, keep)
    about["log"] = from_log(askers[OURS])
    servers.stop([side.name])


if __name__ == "__main__":
    main(lambda: run(sys.argv[1:]))
