"""Measures how fast a directory is verified, beside the rate at which its disk is read.

    python -m checkpoint.synthetic SOURCE --size medium
    python -m quantize.fp8 recipes/tiny/fp8.yaml model=SOURCE output=DIR calibrate.samples=1
    python -m benchmarks.verify_speed DIR --source SOURCE --json benchmarks/results/FILE

The files leave the page cache before each measurement. The read rate is that of one thread reading
all files of DIR one after the other. `verify` runs in a process of its own; its start, with the
import of its libraries, is measured by itself and subtracted.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.parts import write_json
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import BadInput, Fault, main
from checkpoint.libraries import installed_versions

_BLOCK = 16 * 2**20


def _run() -> int:
    parser = command_parser("benchmarks.verify_speed", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--source", type=Path, required=True, metavar="BF16_DIR")
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    given = parse_command(parser)
    weights = _bytes_of(given.directory)
    both = weights + _bytes_of(given.source)
    _evict(given.directory)
    read_seconds = _read(given.directory)
    disk_rate = weights / read_seconds / 1e9
    start = _start()
    runs = {}
    for name, options in (("alone", ()), ("with source", ("--source", str(given.source)))):
        _evict(given.directory)
        _evict(given.source)
        verified = _verify([str(given.directory), *options])
        seconds = verified.seconds - start.seconds
        busy = verified.processor - start.processor
        gigabytes = (both if options else weights) / 1e9
        runs[name] = {
            "gigabytes_read": round(gigabytes, 2),
            "seconds": round(seconds, 2),
            "processor_seconds": round(busy, 2),
            "gigabytes_per_second": round(gigabytes / seconds, 2),
            "gigabytes_per_second_of_two_free_cores": round(2 * gigabytes / busy, 2),
        }
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    names = f"{given.directory.name} --source {given.source.name}"
    measured = {
        "command": f"python -m benchmarks.verify_speed {names}",
        "machine": f"{os.cpu_count()} cores, {memory / 1e9:.0f} GB, {platform.machine()}",
        "versions": installed_versions(),
        "disk_gigabytes_per_second": round(disk_rate, 2),
        "start_seconds": round(start.seconds, 2),
        "verify": runs,
        "peak_resident_gb": round(peak / 1e9, 2),
        "limits": "with the source, prompts are run through it as well; other programs ran on both "
        "cores, so that the clock's seconds are too many and the disk's rate is too low",
    }
    write_json(given.json, measured)
    print(measured)
    return 0


def _bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _evict(directory: Path) -> None:
    """Drop the files of a directory from the page cache."""
    os.sync()
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(directory: Path) -> float:
    """Read all weight files once and return the seconds."""
    started = time.monotonic()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(_BLOCK):
                pass
    return time.monotonic() - started


@dataclass(frozen=True)
class _Spent:
    """What a command took: seconds of the clock, and of all processors."""

    seconds: float
    processor: float


def _start() -> _Spent:
    """What the command takes to import what it needs."""
    prepare = "from checkpoint.libraries import prepare_libraries as p; p()"
    return _spend(["-c", f"{prepare}; import export.checks"])


def _verify(arguments: Sequence[str]) -> _Spent:
    """Verify a directory.

    Raises:
        BadInput: It has faults.
    """
    return _spend(["-m", "export.verify", *arguments])


def _spend(arguments: Sequence[str]) -> _Spent:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    done = subprocess.run([sys.executable, *arguments])
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        what = f"ended with exit status {done.returncode}"
        raise BadInput(Fault(" ".join(arguments), what, "measure a sound directory"))
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return _Spent(seconds, processor)


if __name__ == "__main__":
    main(_run)
