"""Quantizes a checkpoint under a limit that the kernel enforces on the process's private memory.

    python -m tests.pipeline.run_within_memory BYTES [key=value …]

The limit counts from what Python, torch and ModelOpt hold when they are imported. The run ends
when the output is written: measuring needs logits of the whole vocabulary, which a smaller model
does not make smaller.
"""

import resource
import sys
from pathlib import Path

from checkpoint.faults import main
from checkpoint.libraries import prepare_libraries
from recipes.loading import SHIPPED, load_recipe


def data_bytes() -> int:
    """Private memory of this process, as RLIMIT_DATA counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmData":
            return int(value.split()[0]) * 1024
    raise RuntimeError("/proc/self/status has no VmData")


if __name__ == "__main__":
    prepare_libraries()
    from pipeline import run as flow

    recipe = load_recipe(SHIPPED / "tiny" / "fp8.yaml", sys.argv[2:])
    flow.verify_and_measure = lambda job, way, times: True
    limit = data_bytes() + int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    main(lambda: flow.run(recipe))
