"""Quantizes a checkpoint under a limit that the kernel enforces on the process's private memory,
whole and layer by layer, each in a copy of this process.

    python -m tests.pipeline.run_within_memory BYTES OUT [key=value …]

The limit counts from what Python, torch and ModelOpt hold when they are imported, which is why the
copies are of this process and not of pytest's. The runs end when the output is written: measuring
needs logits of the whole vocabulary, which a smaller model does not make smaller. Prints the exit
status and stderr of both; their outputs are OUT/whole and OUT/layers.
"""

import json
import resource
import sys
from pathlib import Path

from checkpoint.faults import main
from checkpoint.libraries import prepare_libraries
from recipes.loading import SHIPPED, load_recipe
from tests.forked import fork


def data_bytes() -> int:
    """Private memory of this process, as RLIMIT_DATA counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmData":
            return int(value.split()[0]) * 1024
    raise RuntimeError("/proc/self/status has no VmData")


def quantize(memory: str, limit: int, out: str, overrides: list[str]) -> None:
    """Run the recipe in one way; does not return."""
    given = [*overrides, f"quantize.memory={memory}", f"output={out}/{memory}"]
    recipe = load_recipe(SHIPPED / "tiny" / "fp8.yaml", given)
    flow.verify_and_measure = lambda job, way, times: True
    allowed = data_bytes() + limit
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    main(lambda: flow.run(recipe))


if __name__ == "__main__":
    prepare_libraries()
    from pipeline import run as flow

    limit, out, *overrides = sys.argv[1:]
    found = {}
    for memory in ("layers", "whole"):
        done = fork(lambda memory=memory: quantize(memory, int(limit), out, overrides))
        found[memory] = {"status": done.returncode, "stderr": done.stderr}
    print(json.dumps(found))
