"""Runs a command of this package and writes how long it took and the most memory it had resident.

    python -m benchmarks.memory --json FILE -- quantize.fp8 recipes/fp8.yaml model=FULL output=OUT
    device=cpu …

The peak is the kernel's own figure, mapped files included, as `/usr/bin/time -v` gives it; this
program, which a child inherits its first peak from, imports nothing large before the command has
ended. A command that fails leaves no file; one that ends with a missed gate, as random weights do,
has that gate in it.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.parts import write_json
from checkpoint.faults import BadInput, Fault, main

_MISSED = "gate missed:"


def _run() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("command", nargs="+", metavar="MODULE ARGUMENT")
    given = parser.parse_args()
    start, missed = time.monotonic(), None
    with subprocess.Popen(
        [sys.executable, "-m", *given.command], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            missed = line.strip() if line.startswith(_MISSED) else missed
    seconds, status = time.monotonic() - start, process.returncode
    if status and not (status == 1 and missed):
        raise BadInput(
            Fault(" ".join(given.command), f"ended with exit status {status}", "see what it said")
        )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    from pipeline.inputs import versions

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    measured = {
        "command": "python -m benchmarks.memory -- "
        + re.sub(r"=/(\S*/)?", "=", " ".join(given.command)),
        "machine": f"{os.cpu_count()} cores, {memory:.0f} GB, {platform.machine()}",
        "versions": versions(),
        "gate": missed or "passed, or none",
        "seconds": round(seconds, 1),
        "peak_resident_gb": round(peak / 1e9, 3),
    }
    write_json(given.json, measured)
    print(f"{seconds:.0f} s, at most {peak / 1e9:.2f} GB resident")
    return 0


if __name__ == "__main__":
    main(_run)
