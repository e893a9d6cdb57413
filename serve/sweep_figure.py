"""Draws the figure of a sweep: accuracy, and the time to the first token, against the EVS rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint import atomic

_INCHES = (9.0, 3.6)


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `sweep.svg` and `sweep.png`.

    Args:
        result: What `serve.sweep` writes as JSON.
        folder: Where to.
    """
    import matplotlib
    from matplotlib.figure import Figure

    written = []
    # Text stays text in the SVG, and the same figures give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hybridquant"}):
        figure = Figure(figsize=_INCHES, layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_accuracy(left, result)
        _draw_times(right, result)
        for suffix in ("svg", "png"):
            path = folder / f"sweep.{suffix}"
            with atomic.replaced_file(path) as partial:
                figure.savefig(partial, format=suffix, dpi=150, metadata=_metadata(suffix))
            written.append(path)
    return written


def _metadata(suffix: str) -> dict[str, Any]:
    return {"Date": None} if suffix == "svg" else {}


def _draw_accuracy(axes: Any, result: Mapping[str, Any]) -> None:
    for directory, rows in _by_directory(result["measured"]).items():
        rates = []
        accuracies = []
        below = []
        above = []
        for row in rows:
            rates.append(row["rate"])
            accuracies.append(100 * row["accuracy"])
            # The interval is that of the loss: where it ends high, accuracy ends low.
            below.append(max(0.0, row["loss_high"] - row["loss"]))
            above.append(max(0.0, row["loss"] - row["loss_low"]))
        bars = [below, above]
        axes.errorbar(rates, accuracies, yerr=bars, marker="o", capsize=3, label=directory)
    for row in result["recommended"]:
        axes.axvline(row["rate"], linestyle=":", color="gray")
    axes.set_title("accuracy; bars: 95 % interval of the loss", fontsize=10)
    axes.set_ylabel("answers that are right (%)")
    axes.set_ylim(top=min(101, axes.get_ylim()[1]))
    _finish(axes, result)


def _draw_times(axes: Any, result: Mapping[str, Any]) -> None:
    measured = _by_directory(result["load"])
    for directory in _by_directory(result["measured"]):
        for concurrency in result["concurrency"]:
            rates = []
            times = []
            for row in measured.get(directory, []):
                if row["concurrency"] == concurrency:
                    rates.append(row["rate"])
                    times.append(row["ttft_ms_median"])
            axes.plot(rates, times, marker="o", label=f"{directory}, {concurrency} at a time")
    axes.set_title("time to the first token, median", fontsize=10)
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    _finish(axes, result)


def _finish(axes: Any, result: Mapping[str, Any]) -> None:
    axes.set_xlabel("EVS rate: share of a clip's visual tokens that is dropped")
    axes.set_xticks(sorted({row["rate"] for row in result["measured"]}))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _by_directory(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by the name of their directory, in the order of its first row."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["directory"], []).append(row)
    return found
