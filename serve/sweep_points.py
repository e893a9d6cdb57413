"""Measures the points of a sweep, a directory at a rate each, and keeps what was measured."""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint import atomic
from checkpoint.command import command_name
from checkpoint.faults import BadInput, Fault
from checkpoint.log import get_logger
from checkpoint.naming import directory_names
from serve.bench import concurrencies
from serve.bench_figures import rounded, summarize
from serve.bench_runs import BenchClient, BenchFailed, Target, bench_client, write_requests
from serve.environment import ServeEnvironment
from serve.options import given_settings
from serve.own_server import own_server
from serve.preflight import checked_settings
from serve.process import running_server
from serve.settings import ServeSettings, override
from serve.sweep_items import Items
from serve.vllm_flags import flags_after

logger = get_logger("serve.sweep")

WITHOUT_CACHE = ("--mm-processor-cache-gb", "0")
"""With prefix caching off too, as it is here, vLLM keeps nothing of a request's media
(vllm/renderers/base.py, 0.32)."""

MEASURED_FILE = "measured.json"
"""The file of `--out` from which the command goes on."""

MOST_FAILED = 0.02
"""Share of requests that may fail; their answers count as wrong."""

Point = dict[str, Any]
"""What was measured of a directory at a rate: `answers` by task, `load`, `prompt_tokens_mean`."""

_POINT_KEYS = {"answers", "load", "prompt_tokens_mean"}


class Kept:
    """What was measured, kept in a file from which the same command goes on.

    Args:
        path: The file.
        settings: What the figures depend on besides directory and rate. Figures of other settings
            are dropped.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._settings = json.loads(json.dumps(settings))
        self._points: dict[str, Point] = {}
        if not path.exists():
            return
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            same = kept["settings"] == self._settings
            points = dict(kept["points"])
            if not all(point.keys() >= _POINT_KEYS for point in points.values()):
                raise ValueError("a point is not whole")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(
                Fault(str(path), "is not a file of a sweep", "give another --out")
            ) from None
        if same:
            self._points = points
        else:
            logger.warning("%s has figures of other settings: measured again", path)

    def get(self, key: str) -> Point | None:
        """Return what was measured under a name, or None."""
        return self._points.get(key)

    def put(self, key: str, point: Point) -> None:
        """Keep what was measured, and write the file."""
        self._points[key] = point
        atomic.write_json(self._path, {"settings": self._settings, "points": self._points})


def fingerprint(directory: Path) -> str:
    """Return a name for what a directory holds: it changes when a file is written again."""
    parts = []
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.json")]):
        state = path.stat()
        parts.append(f"{path.name} {state.st_size} {state.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def digest(items: Items) -> str:
    """Return a name for a set of items; it changes with any message or answer."""
    found = hashlib.sha256()
    for task, samples in items.items():
        for sample in samples:
            found.update(json.dumps([task, sample.messages, sample.answer]).encode())
    return found.hexdigest()[:16]


def measure_target(
    target: Target, items: Items, concurrency: Sequence[int], max_tokens: int, client: BenchClient
) -> Point:
    """Ask a server the items, once at every concurrency.

    Raises:
        BenchFailed: It answers nothing, or too many requests fail.
    """
    samples = [sample for asked in items.values() for sample in asked]
    point: Point = {"load": []}
    with tempfile.TemporaryDirectory() as scratch:
        requests = Path(scratch) / "requests.jsonl"
        write_requests(requests, [sample.messages for sample in samples])
        for count in concurrency:
            warm_up = min(len(samples), count)
            client.run(target, requests, warm_up, count, max_tokens, ignore_eos=False)
            load = client.run(target, requests, len(samples), count, max_tokens, ignore_eos=False)
            failed = len(load.errors)
            if failed > MOST_FAILED * len(samples):
                what = f"{failed} of {len(samples)} requests failed: {load.errors[0]}"
                more = f"{command_name('serve.ask')} says more"
                raise BenchFailed(f"{target.name}: {what}; {more}")
            row = summarize(target.name, count, [load], None)
            logger.info("%s", row)
            point["load"].append(rounded(row))
            point.setdefault("prompt_tokens_mean", row.prompt_tokens_mean)
            point.setdefault("answers", _by_task(load.texts, items))
    return point


def _by_task(answers: Sequence[str | None], items: Items) -> dict[str, list[str | None]]:
    remaining = iter(answers)
    return {task: [next(remaining) for _ in asked] for task, asked in items.items()}


def open_kept(
    options: argparse.Namespace,
    flags: Sequence[str],
    items: Items,
    environment: ServeEnvironment,
) -> Kept:
    """Open what an earlier run of the same command has measured into `options.out`.

    Raises:
        BadInput: The file there is not one of a sweep.
    """
    settings = {
        "items": digest(items),
        "concurrency": options.concurrency,
        "max_tokens": options.max_tokens,
        "settings": {name: str(value) for name, value in given_settings(options).items()},
        "flags": list(flags),
        "vllm": environment.vllm,
    }
    return Kept(options.out / MEASURED_FILE, settings)


def point_name(directory: Path, rate: float) -> str:
    """Return what a point is kept under."""
    return f"{directory.resolve().name} {fingerprint(directory)} at {rate:g}"


def measure_all(
    options: argparse.Namespace,
    flags: Sequence[str],
    items: Items,
    rates: Sequence[float],
    environment: ServeEnvironment,
) -> dict[tuple[str, float], Point]:
    """Measure every directory at every rate, except what was measured before.

    Raises:
        BadInput: The settings have faults.
        ServerDied: vLLM does not start.
        BenchFailed: It answers nothing, or too many requests fail.
    """
    kept = open_kept(options, flags, items, environment)
    overrides = given_settings(options) | {"port": 0}
    points: dict[tuple[str, float], Point] = {}
    with bench_client(environment) as client:
        names = directory_names(options.directories)
        for name, directory in zip(names, options.directories, strict=True):
            settings = checked_settings(directory, overrides, flags, environment)
            for rate in rates:
                kept_name = point_name(directory, rate)
                point = kept.get(kept_name)
                if point is not None:
                    logger.info("%s at rate %g: measured before", name, rate)
                else:
                    at_rate = override(settings, {"video.pruning_rate": rate})
                    point = _serve_and_measure(
                        name, directory, at_rate, flags, items, options, client, environment
                    )
                    kept.put(kept_name, point)
                points[name, rate] = point
    return points


def _serve_and_measure(
    name: str,
    directory: Path,
    settings: ServeSettings,
    flags: Sequence[str],
    items: Items,
    options: argparse.Namespace,
    client: BenchClient,
    environment: ServeEnvironment,
) -> Point:
    """Measure one directory, called `name` in messages, at one rate."""
    all_flags = flags_after(WITHOUT_CACHE, flags)
    counts = concurrencies(options.concurrency)
    with running_server(directory, settings, all_flags, environment=environment) as server:
        reached = own_server(server.settings)
        at_rate = f"{name} at rate {settings.video.pruning_rate:g}"
        target = Target(at_rate, reached.url, server.model, reached.api_key)
        return measure_target(target, items, counts, options.max_tokens, client)
