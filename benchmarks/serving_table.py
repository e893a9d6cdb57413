"""Measures stock `vllm serve` against `python -m serve`, by precision and EVS rate.

    python -m benchmarks.serving_table MODELS FILM --json FILE
    python -m benchmarks.serving_table MODELS FILM --json FILE --pairs fp8:0.75 fp8:0.75/bf16:0 \
        --lines clip,clips --vllm="--load-format dummy --enforce-eager"

MODELS holds a directory by format: bf16, fp8 and nvfp4, which `benchmarks.unweighted` writes. FILM
is a 720p MP4 file. A pair is FORMAT:RATE, served by both, or OURS/STOCK where they differ:
`fp8:0.75/bf16:0` is FP8 with EVS by us against BF16 without it by stock vLLM. Stock gets the flags
of the launch post, and those without which it would be asked something else: 128 frames of a clip.

Lines:

  clip      first token of a clip of 64 s that is new (128 frames), seconds
  clips     12 new clips of 32 s at once, 128 tokens each: requests per second
  images    64 new pages of A4 at 300 dots per inch, 16 at once: requests per second
  decode64  64 requests for text at once: tokens per second (see `benchmarks.decode`)
  decode1   the same with one
  long      first token of one prompt of 120,000 tokens, seconds

The last four do not depend on the rate, and are measured with the first pair of each format.

As many pairs as the GPU holds form a stage, whose servers start at once; servers that the next
stage needs go on running. The two servers of a pair are asked in turn while all others are idle.
Everything ends --seconds after the command, and what is missing is named. The file is written again
after every line, and the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.decode import from_log, in_turn, pairs
from benchmarks.gpu_shares import USABLE
from benchmarks.paired_servers import Asker, Measured, Servers, measured_with
from benchmarks.parts import Parts, write_json
from benchmarks.table_lines import LINES, Line, Sizes, Workbench
from benchmarks.table_pairs import Pair, Plan, default_pairs, parse_pair, plan_of
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import BadInput, Fault, main, raise_if_any
from checkpoint.log import get_logger
from serve.environment import ServeEnvironment, find_environment
from serve.settings import ServeSettings

logger = get_logger(__name__)

LEAST_SECONDS_TO_START = 100.0
"""A stage is begun only when so much time is left."""

LEAST_SECONDS_LEFT = 20.0
"""A line is begun only when so much time is left."""


class Table:
    """What is measured so far, and the file that it is written to.

    Args:
        plan: What is to be measured.
        parts: Lines that are finished.
        about: What the file says beside them.
        path: The file.
    """

    def __init__(self, plan: Plan, parts: Parts, about: Measured, path: Path) -> None:
        self._plan = plan
        self._parts = parts
        self._about = about
        self._path = path
        self._missing: dict[str, str] = dict(plan.too_large)

    def is_done(self, pair: Pair) -> bool:
        """Return whether all lines of a pair are measured."""
        return not self.left(pair)

    def left(self, pair: Pair) -> list[Line]:
        """Return the lines of a pair that are not measured."""
        return [line for line in self._plan.lines[pair.name] if not self._has(pair, line)]

    def measure(self, pair: Pair, line: Line, work: Callable[[], Measured]) -> None:
        """Measure a line, and write the file."""
        name = _part(pair, line)
        logger.info("%s", name)
        try:
            found = self._parts.part(name, work)
            logger.info("%s", json.dumps(found.get("ratio")))
            self._missing.pop(name, None)
        except OSError as error:  # refused, or too slow: the other lines are still measured
            self._missing[name] = f"not measured: {error}"
            logger.warning("%s: %s", name, error)
        self.write()

    def note(self, server: str, found: Callable[[], Measured]) -> None:
        """Keep what is known of a server."""
        self._parts.part(_server_part(server), found)
        self.write()

    def miss(self, pair: Pair, why: str) -> None:
        """Name the reason for which the lines that are left are missing."""
        for line in self.left(pair):
            self._missing.setdefault(_part(pair, line), f"not measured: {why}")
        self.write()

    @property
    def missing(self) -> list[str]:
        """Names of the lines that are missing."""
        names = []
        for pair in self._plan.pairs:
            names += [_part(pair, line) for line in self.left(pair)]
        return [*names, *self._plan.too_large]

    def write(self) -> None:
        """Write the file."""
        table: dict[str, dict[str, Any]] = {}
        for pair in self._plan.pairs:
            cells = table.setdefault(pair.name, {})
            for line in self._plan.all_lines[pair.name]:
                name = _part(pair, line)
                done = self._parts.get(name)
                cells[line.title] = done or self._missing.get(name, "not measured")
        servers = {}
        for name, side in self._plan.sides.items():
            log = self._parts.get(_server_part(name))
            servers[name] = side.described() | ({} if log is None else {"log": log})
        write_json(self._path, self._about | {"servers": servers, "table": table})

    def _has(self, pair: Pair, line: Line) -> bool:
        return self._parts.get(_part(pair, line)) is not None


def _part(pair: Pair, line: Line) -> str:
    return f"{pair.name}: {line.title}"


def _server_part(server: str) -> str:
    return f"server {server}"


def fill(table: Table, plan: Plan, servers: Servers, bench: Workbench, end: float) -> None:
    """Start the servers of one stage after another, and measure its pairs.

    Args:
        table: Where it goes.
        plan: The stages.
        servers: Of this machine.
        bench: Asks the questions.
        end: Time, of `time.monotonic`, after which nothing is begun.
    """
    for stage in plan.stages:
        todo = [pair for pair in stage if not table.is_done(pair)]
        if not todo:
            continue
        left = end - time.monotonic()
        if left < LEAST_SECONDS_TO_START:
            for pair in todo:
                table.miss(pair, "no time left")
            continue
        _exchange(servers, plan, todo, left - LEAST_SECONDS_LEFT)
        for pair in todo:
            askers = {}
            for role, name in pair.servers.items():
                if name in servers.askers:
                    askers[role] = servers.askers[name]
                    table.note(name, functools.partial(from_log, servers.askers[name]))
            absent = [name for name in pair.servers.values() if name in servers.failed]
            if absent:
                table.miss(pair, f"{absent[0]} did not start: {servers.failed[absent[0]]}"[:600])
                continue
            _measure(table, pair, askers, bench, end)


def _exchange(servers: Servers, plan: Plan, todo: Sequence[Pair], seconds: float) -> None:
    """Stop the servers that are not needed any more, and start those that are missing."""
    needed = dict.fromkeys(name for pair in todo for name in pair.servers.values())
    servers.stop([name for name in servers.askers if name not in needed])
    missing = [plan.sides[name] for name in needed if name not in servers.askers]
    try:
        servers.start(missing, seconds)
    except BadInput as bad:
        for side in missing:
            servers.failed[side.name] = str(bad)


def _measure(
    table: Table, pair: Pair, askers: Mapping[str, Asker], bench: Workbench, end: float
) -> None:
    for line in table.left(pair):
        if time.monotonic() > end - LEAST_SECONDS_LEFT:
            table.miss(pair, "no time left")
            return

        def work(line: Line = line) -> Measured:
            bench.prompt_tokens = {}
            run = bench.runner(line)
            repeats = line.repeats or bench.sizes.repeats
            found = in_turn(dict(askers), run, repeats, line.more_is_better, end, line.warms_up)
            tokens = {role: bench.prompt_tokens.get(asker.url) for role, asker in askers.items()}
            return found | ({"prompt_tokens": tokens} if any(tokens.values()) else {})

        table.measure(pair, line, work)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.serving_table", __doc__)
    parser.add_argument("models", type=Path, metavar="MODELS", help="holds a directory by format")
    parser.add_argument("film", type=Path, metavar="FILM", help="a 720p MP4 file")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    parser.add_argument(
        "--pairs", nargs="*", metavar="FORMAT:RATE", help="in this order (default: all)"
    )
    parser.add_argument("--lines", default=",".join(LINES), help="(default: all)")
    parser.add_argument("--vllm", default="", metavar="FLAGS", help="flags for all servers")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of ours"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds of a line (default: 3)")
    parser.add_argument("--seconds", type=float, default=540, help="for everything (default: 540)")
    for field in dataclasses.fields(Sizes):
        if field.name != "repeats":
            option = "--" + field.name.replace("_", "-")
            parser.add_argument(option, type=type(field.default), default=field.default)
    return parser


def _checked(options: argparse.Namespace) -> tuple[list[Pair], list[Line]]:
    """Return what the options ask for.

    Raises:
        BadInput: With every fault.
    """
    faults: list[Fault] = []
    found = []
    for word in default_pairs() if options.pairs is None else options.pairs:
        try:
            found.append(parse_pair(word))
        except BadInput as bad:
            faults += bad.faults
    keys = [key for key in options.lines.split(",") if key]
    unknown = [key for key in keys if key not in LINES]
    if unknown:
        faults.append(Fault("--lines", f"has {unknown[0]!r:.80}", f"among {', '.join(LINES)}"))
    for field in dataclasses.fields(Sizes):
        if getattr(options, field.name) <= 0:
            option = "--" + field.name.replace("_", "-")
            faults.append(Fault(option, f"is {getattr(options, field.name)}", "give more than 0"))
    if not options.film.is_file():
        faults.append(Fault(str(options.film), "no such file", "give a 720p MP4 file"))
    raise_if_any(faults)
    return found, [LINES[key] for key in keys]


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status: 1 if a line is missing.

    Raises:
        BadInput: The options or a directory have faults.
    """
    begun = time.monotonic()
    options = parse_command(_parser(), arguments)
    wanted, lines = _checked(options)
    environment = find_environment()
    sizes = Sizes(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Sizes)})
    settings = pairs(options.set, "--set")
    with tempfile.TemporaryDirectory() as scratch:
        media = Path(scratch).resolve()
        plan = plan_of(
            wanted,
            lines,
            sizes,
            options.models,
            media,
            shlex.split(options.vllm),
            settings,
            environment,
        )
        table = _table(options, arguments, plan, environment, sizes)
        bench = Workbench(sizes, media, options.film.resolve())
        ahead = threading.Thread(target=bench.draw_ahead, args=(plan.page_count,), daemon=True)
        ahead.start()
        shared = ServeSettings(allowed_local_media_path=media)
        with Servers(shared, environment) as servers:
            fill(table, plan, servers, bench, begun + options.seconds)
        ahead.join()
    for name in table.missing:
        logger.warning("missing: %s", name)
    return 1 if table.missing else 0


def _table(
    options: argparse.Namespace,
    arguments: Sequence[str],
    plan: Plan,
    environment: ServeEnvironment,
    sizes: Sizes,
) -> Table:
    settings = {
        "device": environment.device.name,
        "vllm": [environment.version, options.vllm, options.set],
        "sizes": dataclasses.asdict(sizes),
    }
    about = measured_with("serving_table", arguments, environment) | {
        "notes": [
            "The two servers of a pair share a GPU and are asked in turn; all others are idle. "
            "Ratios are above 1 where ours is better. Clips are loops of the film, each with bytes "
            "of its own, named by file:// URLs.",
        ],
        "usable_share_of_the_gpu": USABLE,
    }
    parts = Parts(options.json.with_suffix(".partial.json"), settings)
    table = Table(plan, parts, about, options.json)
    table.write()  # A file that cannot be written is found before the servers start.
    return table


if __name__ == "__main__":
    main(lambda: run(sys.argv[1:]))
