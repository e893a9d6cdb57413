"""Runs a command of this package and writes how long it took and the most memory it had resident.

    python -m benchmarks.memory --json FILE -- quantize.fp8 recipes/fp8.yaml model=FULL output=OUT device=cpu …

The peak is the kernel's own figure for the process, mapped files included, as `/usr/bin/time -v` gives it. A command
that ends with an exit status other than 0 or 1 (a missed gate) leaves no file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from checkpoint.faults import BadInput, Fault, main
from recipes.inputs import versions


def _run() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("command", nargs="+", metavar="MODULE ARGUMENT")
    given = parser.parse_args()
    start = time.monotonic()
    status = subprocess.run([sys.executable, "-m", *given.command]).returncode
    seconds = time.monotonic() - start
    if status not in (0, 1):
        raise BadInput(Fault(" ".join(given.command), f"ended with exit status {status}", "see what it said"))
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    measured = {
        "command": "python -m benchmarks.memory -- " + re.sub(r"=/(\S*/)?", "=", " ".join(given.command)),
        "machine": f"{os.cpu_count()} cores, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB, "
        + platform.machine(),
        "versions": versions(),
        "exit_status": status,
        "seconds": round(seconds, 1),
        "peak_resident_gb": round(peak / 1e9, 3),
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print(f"{seconds:.0f} s, at most {peak / 1e9:.2f} GB resident")
    return 0


if __name__ == "__main__":
    main(_run)
