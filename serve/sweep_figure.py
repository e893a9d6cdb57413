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
    for directory in _directories(result):
        rows = [row for row in result["measured"] if row["directory"] == directory]
        rates = [row["rate"] for row in rows]
        accuracies = [100 * row["accuracy"] for row in rows]
        below = [max(0.0, row["loss_high"] - row["loss"]) for row in rows]
        above = [max(0.0, row["loss"] - row["loss_low"]) for row in rows]
        axes.errorbar(
            rates, accuracies, yerr=[below, above], marker="o", capsize=3, label=directory
        )
    for row in result["recommended"]:
        axes.axvline(row["rate"], linestyle=":", color="gray")
    axes.set_title("accuracy; bars: 95 % interval of the loss", fontsize=10)
    axes.set_ylabel("answers that are right (%)")
    axes.set_ylim(top=min(101, axes.get_ylim()[1]))
    _finish(axes, result)


def _draw_times(axes: Any, result: Mapping[str, Any]) -> None:
    for directory in _directories(result):
        for concurrency in result["concurrency"]:
            rows = []
            for row in result["load"]:
                if (row["directory"], row["concurrency"]) == (directory, concurrency):
                    rows.append(row)
            rates = [row["rate"] for row in rows]
            times = [row["ttft_ms_median"] for row in rows]
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


def _directories(result: Mapping[str, Any]) -> Sequence[str]:
    """Names of the directories in their order."""
    return list(dict.fromkeys(row["directory"] for row in result["measured"]))
