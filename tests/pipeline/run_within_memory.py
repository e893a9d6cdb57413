"""Quantizes a checkpoint a layer at a time under a limit that the kernel enforces on the process's
private memory.

    python -m tests.pipeline.run_within_memory BYTES [key=value …]

The limit counts from what Python, torch and ModelOpt hold when they are imported.
"""

import resource
import sys
from pathlib import Path

from checkpoint.faults import main
from pipeline import run as flow
from pipeline.streaming import stream
from recipes.schema import load_recipe


def data_bytes() -> int:
    """Private memory of this process, as RLIMIT_DATA counts it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmData"].split()[0]) * 1024


if __name__ == "__main__":
    recipe = load_recipe(Path("recipes/tiny/fp8.yaml"), sys.argv[2:])
    # Its measuring needs logits of the whole vocabulary, which a smaller model does not make
    # smaller.
    flow.run_streamed = lambda job: stream(job) is None
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + int(sys.argv[1]),) * 2)
    main(lambda: flow.run(recipe))
