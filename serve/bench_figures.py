"""The figures of `serve.bench`: repeats put together, two servers compared, tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from serve.bench_runs import Load

if TYPE_CHECKING:
    from rich.table import Table

_PADDING = (0, 0, 0, 1)
"""Around the cells of a table, so that it fits 80 columns."""

MEASURES = ("ttft_ms_median", "tpot_ms_median", "requests_per_s", "output_tokens_per_s")
"""What ratios are given of."""


@dataclass(frozen=True)
class Measured:
    """One server at one concurrency.

    Attributes:
        server: Its name.
        concurrency: Requests at a time.
        requests: Requests that were answered in all repeats.
        failed: Requests that were not.
        ttft_ms_median: Time to the first token in milliseconds, median over all requests.
        ttft_ms_p99: Its 99th percentile.
        tpot_ms_median: Time per further token; None where no answer has a second token.
        tpot_ms_p99: Its 99th percentile.
        requests_per_s: Answered requests per second, median of the repeats.
        output_tokens_per_s: Tokens of the answers per second, median of the repeats.
        prompt_tokens_mean: Tokens of a prompt after EVS.
        peak_gpu_mib: See `GpuMemory.peak_mib`.
    """

    server: str
    concurrency: int
    requests: int
    failed: int
    ttft_ms_median: float
    ttft_ms_p99: float
    tpot_ms_median: float | None
    tpot_ms_p99: float | None
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_mean: float
    peak_gpu_mib: int | None

    def __str__(self) -> str:
        first = f"first token {self.ttft_ms_median:.0f} ms"
        speed = f"{self.requests_per_s:.2f} requests/s, {self.output_tokens_per_s:.0f} tokens/s"
        return f"{self.server}, {self.concurrency} at a time: {first}, {speed}"


@dataclass(frozen=True)
class Ratio:
    """The second server over the first in one measure.

    Attributes:
        concurrency: Requests at a time.
        measure: One of `MEASURES`.
        ratio: Median of the repeats.
        low: The least of them.
        high: The largest.
    """

    concurrency: int
    measure: str
    ratio: float
    low: float
    high: float


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of `values` lies, interpolated as NumPy does."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def summarize(
    server: str, concurrency: int, loads: Sequence[Load], peak_gpu_mib: int | None
) -> Measured:
    """Put the repeats of one server at one concurrency together."""
    ttft = [value for load in loads for value in load.ttft_ms]
    tpot = [value for load in loads for value in load.tpot_ms]
    lengths = [length for load in loads for length in load.prompt_tokens if length]
    return Measured(
        server=server,
        concurrency=concurrency,
        requests=len(ttft),
        failed=sum(len(load.errors) for load in loads),
        ttft_ms_median=statistics.median(ttft),
        ttft_ms_p99=percentile(ttft, 0.99),
        tpot_ms_median=statistics.median(tpot) if tpot else None,
        tpot_ms_p99=percentile(tpot, 0.99) if tpot else None,
        requests_per_s=statistics.median(load.requests_per_s for load in loads),
        output_tokens_per_s=statistics.median(load.output_tokens_per_s for load in loads),
        prompt_tokens_mean=statistics.mean(lengths),
        peak_gpu_mib=peak_gpu_mib,
    )


def ratios(concurrency: int, first: Sequence[Load], second: Sequence[Load]) -> list[Ratio]:
    """Compare two servers, repeat by repeat, in each of `MEASURES`."""
    rows = []
    for measure in MEASURES:
        found = []
        for one, other in zip(first, second, strict=True):
            before = getattr(summarize("", concurrency, [one], None), measure)
            after = getattr(summarize("", concurrency, [other], None), measure)
            if before and after:
                found.append(after / before)
        if found:
            median = statistics.median(found)
            rows.append(Ratio(concurrency, measure, median, min(found), max(found)))
    return rows


def rounded(row: Measured | Ratio) -> dict[str, Any]:
    """Return a row for a file: numbers of at most three places."""
    values = {}
    for name, value in asdict(row).items():
        values[name] = round(value, 3) if isinstance(value, float) else value
    return values


def table(rows: Sequence[Measured]) -> Table:
    """Return the figures as a table for the console."""
    from rich import box
    from rich.table import Table

    title = "times in ms: median (99th percentile)"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE, padding=_PADDING)
    columns = ["server", "at once", "TTFT", "TPOT", "requests/s", "tokens/s", "prompt"]
    has_gpu = any(row.peak_gpu_mib is not None for row in rows)
    if has_gpu:
        columns.append("GPU MiB")
    for column in columns:
        shown.add_column(column, justify="left" if column == "server" else "right")
    for row in rows:
        gpu = [str(row.peak_gpu_mib)] if has_gpu else []
        shown.add_row(
            row.server,
            str(row.concurrency),
            _times(row.ttft_ms_median, row.ttft_ms_p99),
            _times(row.tpot_ms_median, row.tpot_ms_p99),
            f"{row.requests_per_s:.2f}",
            f"{row.output_tokens_per_s:.0f}",
            f"{row.prompt_tokens_mean:.0f}",
            *gpu,
        )
    return shown


def _times(median: float | None, p99: float | None) -> str:
    if median is None or p99 is None:
        return "-"
    return f"{median:.3g} ({p99:.3g})" if median < 100 else f"{median:.0f} ({p99:.0f})"


def ratio_table(rows: Sequence[Ratio], first: str, second: str) -> Table:
    """Return the ratios of two servers as a table for the console."""
    from rich import box
    from rich.table import Table

    title = f"{second} over {first}: median of the repeats (least … largest)"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE, padding=_PADDING)
    for column in ("at once", "measure", "ratio"):
        shown.add_column(column, justify="left" if column == "measure" else "right")
    for row in rows:
        ratio = f"{row.ratio:.2f} ({row.low:.2f} … {row.high:.2f})"
        shown.add_row(str(row.concurrency), row.measure, ratio)
    return shown
