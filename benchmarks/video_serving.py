"""Asks stock vLLM, with one thread and with all, and ours about new clips and pages: how long until
the first token, and how many at once.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.paired_servers import Asker, Measured, Side
from benchmarks.plain_vllm import stock_side
from benchmarks.video_steps import breakdown
from checkpoint.log import get_logger
from hybridquant_vllm.step_times import VARIABLE
from serve.clips import looped
from serve.command import TORCH_THREADS

logger = get_logger(__name__)

STOCK = "stock"
STOCK_THREADS = "stock, OMP_NUM_THREADS set"
OURS = "plugin"
SERVERS = (STOCK, STOCK_THREADS, OURS)

PAINTERS = 8
"""Threads that draw pages; Pillow compresses them beside one another."""

FIFTH = 5
"""Request by which a server has compiled what it needs."""


def sides(
    directory: Path, rate: float, flags: Sequence[str], media: Path, variables: Mapping[str, str]
) -> list[Side]:
    """Return the servers: stock vLLM twice, and ours.

    Stock vLLM makes media ready on one thread of torch, unless OMP_NUM_THREADS is set; the second
    one has it set to the number of cores.

    Args:
        directory: A checkpoint.
        rate: Of EVS.
        flags: More flags of `vllm serve`, for all.
        media: Folder that requests may name files of; the plug-in's step times go there.
        variables: More environment variables of the server with the plug-in.
    """
    threads = {TORCH_THREADS: str(len(os.sched_getaffinity(0)))}
    written = {VARIABLE: str(step_times(media))}
    settings = {"video.pruning_rate": f"{rate:g}"}
    return [
        stock_side(STOCK, directory, rate, media, flags),
        stock_side(STOCK_THREADS, directory, rate, media, flags, threads),
        Side(OURS, directory, tuple(flags), settings, dict(variables) | written),
    ]


def step_times(media: Path) -> Path:
    """Return the file of the plug-in's step times in a folder of media."""
    return media / "steps.jsonl"


class Workload:
    """Clips and pages that no server has seen, written as they are needed.

    Args:
        folder: Where the files go.
        films: MP4 files by the height of their frames.
    """

    def __init__(self, folder: Path, films: dict[int, Path]) -> None:
        self._folder = folder
        self.films = films
        self._count = 0

    @property
    def folder(self) -> Path:
        """Where the files go."""
        return self._folder

    def clip(self, height: int, seconds: float) -> Path:
        """Write a loop of a film whose bytes are new."""
        self._count += 1
        path = self._folder / f"clip{self._count}.mp4"
        path.write_bytes(looped(self.films[height], seconds, self._count))
        return path

    def page(self) -> Path:
        """Draw a page of A4 at 300 dots per inch, full of text."""
        self._count += 1
        return self._drawn_page(self._count)

    def pages(self, count: int) -> list[Path]:
        """Draw `count` pages, several at once."""
        numbers = range(self._count + 1, self._count + count + 1)
        self._count += count
        with ThreadPoolExecutor(PAINTERS) as pool:
            return list(pool.map(self._drawn_page, numbers))

    def _drawn_page(self, number: int) -> Path:
        from PIL import Image, ImageDraw

        words = random.Random(number)
        image = Image.new("RGB", (2480, 3508), "white")
        pen = ImageDraw.Draw(image)
        for line in range(60):
            text = " ".join(f"{words.random():.12f}" for _ in range(9))
            pen.text((120, 120 + 54 * line), text, fill="black", font_size=30)
        path = self._folder / f"page{number}.png"
        image.save(path, compress_level=1)
        return path


def measure(
    askers: dict[str, Asker], work: Workload, seconds: float, keep: Callable[[Measured], None]
) -> Measured:
    """Measure all servers, in turn, as far as the time goes.

    Args:
        askers: The servers by name.
        work: What they are asked about.
        seconds: Time to spend; a part is begun only before it has passed.
        keep: Called with everything measured so far after each part.
    """
    end = time.monotonic() + seconds
    new_clip = partial(work.clip, 720, 64.0)
    times = step_times(work.folder)
    steps = partial(breakdown, askers[OURS], times=times, count=5)
    parts: dict[str, Callable[[], Measured]] = {
        "64 s of 720p": partial(first_tokens, askers, new_clip, 6),
        "steps of 64 s of 720p": partial(steps, new_clip),
        "the same clip again": partial(again, askers, new_clip, 4),
        "12 clips of 32 s at once": partial(
            at_once, askers, "video", partial(work.clip, 720, 32.0), 12, 12, 128
        ),
    }
    for height in sorted(set(work.films) - {720}):
        clip = partial(work.clip, height, 64.0)
        parts[f"64 s of {height}p"] = partial(first_tokens, askers, clip, 3)
        parts[f"steps of 64 s of {height}p"] = partial(steps, clip)
    parts["32 pages, 16 at once"] = partial(at_once, askers, "image", work.page, 32, 16, 16)
    found: Measured = {}
    for name, part in parts.items():
        if time.monotonic() > end:
            found[name] = "not measured: no time left"
            continue
        logger.info("%s", name)
        try:
            found[name] = part()
        except (OSError, KeyError) as error:  # refused, too slow, or without step times
            found[name] = f"not measured: {error!r}"
        keep(found)
    return found


def first_tokens(askers: dict[str, Asker], new_clip: Callable[[], Path], count: int) -> Measured:
    """Seconds to the first token of new clips, one after another, the servers in turn.

    The plug-in's server is asked first, so that it finds no kernels that another has compiled.
    """
    runs: dict[str, list[Measured]] = {name: [] for name in askers}
    for _ in range(count):
        for name in reversed(SERVERS):
            runs[name].append(askers[name].ask("video", [new_clip()], 1))
    seconds = {name: [run["first"] for run in timed] for name, timed in runs.items()}
    found = _compared(seconds)
    found["prompt_tokens"] = {name: timed[0]["prompt_tokens"] for name, timed in runs.items()}
    if count >= FIFTH:
        found["first against the fifth"] = {
            name: round(times[0] / times[FIFTH - 1], 2) for name, times in seconds.items()
        }
    return found


def again(askers: dict[str, Asker], new_clip: Callable[[], Path], count: int) -> Measured:
    """Seconds to the first token of a clip that is known: what is left is decoding and prefill."""
    clip = new_clip()
    seconds = {}
    for name, asker in askers.items():
        runs = [asker.ask("video", [clip], 1)["first"] for _ in range(count)]
        seconds[name] = runs
    return _compared(seconds)


def _compared(seconds: dict[str, list[float]]) -> Measured:
    """Return all times, the first, and medians of the others."""
    medians = {name: statistics.median(runs[1:]) for name, runs in seconds.items()}
    return {
        "seconds": {name: [round(run, 3) for run in runs] for name, runs in seconds.items()},
        "median without the first": {name: round(value, 3) for name, value in medians.items()},
        "times faster": _against_stock(lambda stock: medians[stock] / medians[OURS]),
    }


def at_once(
    askers: dict[str, Asker],
    kind: str,
    new_file: Callable[[], Path],
    count: int,
    width: int,
    tokens: int,
) -> Measured:
    """Requests per second of `count` requests, `width` of them at a time, twice for each server."""
    rates: dict[str, list[float]] = {name: [] for name in askers}
    for _ in range(2):
        for name, asker in askers.items():
            files = [[new_file()] for _ in range(count)]
            rates[name].append(requests_per_second(asker, kind, files, width, tokens))
    best = {name: max(found) for name, found in rates.items()}
    return {
        "requests per second": {n: [round(rate, 3) for rate in r] for n, r in rates.items()},
        "times as many": _against_stock(lambda stock: best[OURS] / best[stock]),
    }


def _against_stock(ratio: Callable[[str], float]) -> dict[str, float]:
    """Return ours against each of the stock servers."""
    return {stock: round(ratio(stock), 2) for stock in (STOCK, STOCK_THREADS)}


def requests_per_second(
    asker: Asker, kind: str, files: Sequence[Sequence[Path]], width: int, tokens: int
) -> float:
    """Ask about all files, `width` requests at a time, and return how many end in a second.

    Args:
        asker: The server.
        kind: `image` or `video`.
        files: Of each request.
        width: Requests at a time.
        tokens: Tokens of each answer.

    Raises:
        OSError: A request fails.
    """
    start = time.perf_counter()
    with ThreadPoolExecutor(width) as pool:
        answers = [pool.submit(asker.ask, kind, part, tokens) for part in files]
        for answer in answers:
            answer.result()
    return len(files) / (time.perf_counter() - start)
