"""Measures how long a command of this project takes and how much memory it has resident at most.

    python -m benchmarks.memory --json FILE -- quantize.fp8 recipes/fp8.yaml model=FULL output=OUT

The peak is the kernel's figure, which includes mapped files, as `/usr/bin/time -v` prints it. A
command that fails writes no result. A command that ends with a missed gate, as one with random
weights does, is a result, and the file says what was missed.
"""

# A process inherits the peak of its parent, so nothing large is imported here before the command
# has ended.
from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.parts import write_json
from checkpoint.command import command_parser, parse_command
from checkpoint.faults import BadInput, Fault, main
from checkpoint.libraries import installed_versions

_MISSED = "gate missed:"


def _run() -> int:
    parser = command_parser("benchmarks.memory", __doc__)
    parser.add_argument("--json", type=Path, required=True, help="the result file")
    parser.add_argument("command", nargs="+", metavar="MODULE ARGUMENT")
    given = parse_command(parser)
    start = time.monotonic()
    missed = _run_module(given.command)
    seconds = time.monotonic() - start
    peak = _peak_of_children()

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    without_folders = re.sub(r"=/(\S*/)?", "=", " ".join(given.command))
    measured = {
        "command": f"python -m benchmarks.memory -- {without_folders}",
        "machine": f"{os.cpu_count()} cores, {memory / 1e9:.0f} GB, {platform.machine()}",
        "versions": installed_versions(),
        "gate": missed or "passed, or none",
        "seconds": round(seconds, 1),
        "peak_resident_gb": round(peak / 1e9, 3),
    }
    write_json(given.json, measured)
    print(f"{seconds:.0f} s, at most {peak / 1e9:.2f} GB resident")
    return 0


def _run_module(command: Sequence[str]) -> str | None:
    """Run a module, print what it prints, and return its line about a missed gate.

    Raises:
        BadInput: The module fails.
    """
    missed = None
    with subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith(_MISSED):
                missed = line.strip()
    status = process.returncode
    has_missed_gate = status == 1 and missed is not None
    if status != 0 and not has_missed_gate:
        what = f"ended with exit status {status}"
        raise BadInput(Fault(" ".join(command), what, "see its output above"))
    return missed


def _peak_of_children() -> int:
    """Return the largest resident memory of an ended child process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    is_in_bytes = sys.platform == "darwin"
    return peak if is_in_bytes else 1024 * peak


if __name__ == "__main__":
    main(_run)
