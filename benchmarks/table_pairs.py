"""What `benchmarks.serving_table` compares: pairs of servers, their flags, and the stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.decode import BASELINE, OURS
from benchmarks.gpu_shares import USABLE, WEIGHTS, cache_bytes, memory_flags, server_bytes, stages
from benchmarks.paired_servers import Side
from benchmarks.plain_vllm import stock_side
from benchmarks.table_lines import Line, Sizes, load_of
from checkpoint.config import CheckpointConfig, read_config
from checkpoint.faults import BadInput, Fault
from serve.environment import Device, ServeEnvironment
from serve.memory import GB
from serve.settings import ServeSettings

RATES = ("0.75", "0", "0.5", "0.9")

FORMATS = ("fp8", "bf16", "nvfp4")

POST = "fp8:0.75/bf16:0"
"""What the launch post compares: FP8 with EVS against BF16 without it."""


class Served(NamedTuple):
    """A format, and the rate of EVS as it is written."""

    format: str
    rate: str

    def __str__(self) -> str:
        return f"{self.format}, EVS {self.rate}"


@dataclass(frozen=True)
class Pair:
    """What is compared: ours, and stock vLLM's."""

    ours: Served
    stock: Served

    @property
    def name(self) -> str:
        """As the file names it."""
        if self.ours == self.stock:
            return str(self.ours)
        return f"{self.ours}, against {self.stock}"

    @property
    def servers(self) -> dict[str, str]:
        """Names of the two servers, by their part in the comparison."""
        return {BASELINE: f"stock {self.stock}", OURS: f"ours {self.ours}"}

    @property
    def served(self) -> dict[str, Served]:
        """What the two servers serve, by their names."""
        return dict(zip(self.servers.values(), (self.stock, self.ours)))


def default_pairs() -> list[str]:
    """Return all pairs: each format at each rate, and the launch post's."""
    found = [f"{format}:{rate}" for format in FORMATS for rate in RATES]
    return [*found[: len(RATES)], POST, *found[len(RATES) :]]


def parse_pair(word: str) -> Pair:
    """Parse `FORMAT:RATE`, or two of them with a slash between.

    Raises:
        BadInput: It is written otherwise, the format is not known, or the rate is not in [0, 1).
    """
    ours, slash, stock = word.partition("/")
    return Pair(_served(ours, word), _served(stock if slash else ours, word))


def _served(text: str, word: str) -> Served:
    format, _, rate = text.partition(":")
    try:
        is_right = format in WEIGHTS and 0 <= float(rate) < 1
    except ValueError:
        is_right = False
    if not is_right:
        remedy = f"give FORMAT:RATE, as {POST.partition('/')[0]}, of {', '.join(WEIGHTS)}"
        raise BadInput(Fault("--pairs", f"has {word!r:.80}", remedy))
    return Served(format, rate)


@dataclass
class Plan:
    """What is measured, by which servers, and which of them run at once.

    Attributes:
        pairs: In the order in which they are measured.
        stages: Pairs whose servers run at once.
        sides: Servers by name.
        lines: What is measured of each pair, by the pair's name.
        all_lines: The same with those that cannot be measured on this GPU.
        too_large: Why, by pair and line.
        page_count: Pages that will be asked about.
    """

    pairs: list[Pair]
    stages: list[list[Pair]] = field(default_factory=list)
    sides: dict[str, Side] = field(default_factory=dict)
    lines: dict[str, list[Line]] = field(default_factory=dict)
    all_lines: dict[str, list[Line]] = field(default_factory=dict)
    too_large: dict[str, str] = field(default_factory=dict)
    page_count: int = 0


def plan_of(
    wanted: Sequence[Pair],
    lines: Sequence[Line],
    sizes: Sizes,
    models: Path,
    media: Path,
    flags: Sequence[str],
    settings: Mapping[str, str],
    environment: ServeEnvironment,
) -> Plan:
    """Return which servers are started with which flags, and what each pair is asked.

    Args:
        wanted: The pairs.
        lines: What is asked.
        sizes: How much.
        models: Folder that holds a directory by format.
        media: Folder that the servers may read.
        flags: For all servers.
        settings: Of ours, by dotted name.
        environment: Where vLLM is.

    Raises:
        BadInput: A directory is missing or has faults.
    """
    plan = Plan(list(wanted))
    device = environment.device
    configs = {pair.ours.format: read_config(models / pair.ours.format) for pair in wanted}
    configs |= {pair.stock.format: read_config(models / pair.stock.format) for pair in wanted}
    room = USABLE * device.memory
    _choose_lines(plan, lines, sizes, configs, device, room)
    totals = {}
    for name, served in _servers(wanted).items():
        pool = _pool(served, _lines_of(plan, name), sizes, configs)
        totals[name] = _server_bytes(served, pool, configs, device)
        memory = memory_flags(device, totals[name], pool)
        own = [*memory, "--max-num-seqs", str(sizes.at_once), *flags]
        directory = models / served.format
        if name.startswith("stock"):
            plan.sides[name] = stock_side(name, directory, float(served.rate), media, own)
        else:
            chosen = {"video.pruning_rate": served.rate, **settings}
            plan.sides[name] = Side(name, directory, tuple(own), chosen)
    groups = [list(pair.servers.values()) for pair in wanted]
    for stage in stages(groups, totals, room):
        plan.stages.append([wanted[index] for index in stage])
    return plan


def _choose_lines(
    plan: Plan,
    lines: Sequence[Line],
    sizes: Sizes,
    configs: Mapping[str, CheckpointConfig],
    device: Device,
    room: float,
) -> None:
    """Fill in what each pair is asked: the lines for which both servers fit into `room` bytes.

    Lines that do not depend on the rate are asked once for each format.
    """
    seen: set[str] = set()
    for pair in plan.pairs:
        asked = [line for line in lines if line.depends_on_rate]
        if pair.ours == pair.stock and pair.ours.format not in seen:
            seen.add(pair.ours.format)
            asked = list(lines)
        plan.all_lines[pair.name] = list(asked)
        fitting = list(asked)
        while room and fitting:
            needed = _pair_bytes(pair, fitting, sizes, configs, device)
            if needed <= room:
                break
            largest = max(fitting, key=lambda line: _pool(pair.ours, [line], sizes, configs))
            fitting.remove(largest)
            why = f"two servers need {needed / GB:.0f} GB, and {room / GB:.0f} are there"
            plan.too_large[f"{pair.name}: {largest.title}"] = f"not measured: {why}"
        plan.lines[pair.name] = fitting
        if any(line.key == "images" for line in fitting):
            plan.page_count += 2 * sizes.pages


def _servers(pairs: Sequence[Pair]) -> dict[str, Served]:
    """Return all servers of the pairs by name; a server of several pairs is there once."""
    found: dict[str, Served] = {}
    for pair in pairs:
        found |= pair.served
    return found


def _lines_of(plan: Plan, server: str) -> list[Line]:
    """Return the lines that a server is asked, of all pairs that it belongs to."""
    found: list[Line] = []
    for pair in plan.pairs:
        if server in pair.served:
            found += plan.lines[pair.name]
    return found


def _pool(
    served: Served, lines: Sequence[Line], sizes: Sizes, configs: Mapping[str, CheckpointConfig]
) -> int:
    config = configs[served.format]
    return cache_bytes(config, [load_of(line, sizes, config, float(served.rate)) for line in lines])


def _server_bytes(
    served: Served, pool: int, configs: Mapping[str, CheckpointConfig], device: Device
) -> float:
    settings = ServeSettings.model_validate({"video": {"pruning_rate": float(served.rate)}})
    return server_bytes(configs[served.format], served.format, settings, device, pool)


def _pair_bytes(
    pair: Pair,
    lines: Sequence[Line],
    sizes: Sizes,
    configs: Mapping[str, CheckpointConfig],
    device: Device,
) -> float:
    total = 0.0
    for served in (pair.ours, pair.stock):
        pool = _pool(served, lines, sizes, configs)
        total += _server_bytes(served, pool, configs, device)
    return total
