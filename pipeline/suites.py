"""The last step of a run whose recipe names published benchmarks: they decide the gate as well."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import torch

from accuracy.suites.gate import measure_gate
from accuracy.suites.harness import HarnessFailed
from checkpoint.command import command_name
from checkpoint.faults import BadInput, shortened
from checkpoint.log import get_logger
from export.manifest import read_manifest, write_manifest
from recipes.schema import Recipe
from serve.process import ServerDied

logger = get_logger(__name__)


def release_memory() -> None:
    """Give unused memory back to the system and the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_suites(recipe: Recipe, reference: Path) -> bool:
    """Serve BF16 and the output, ask the recipe's benchmarks, and record the outcome.

    Where the harnesses or the data are missing, the output stays passed, and a warning says how to
    measure later.

    Args:
        recipe: The run's, with a section `accuracy.suites`.
        reference: BF16's directory.

    Returns:
        Whether the gate passed, or could not be asked.
    """
    required = recipe.accuracy.suites
    assert required is not None
    out = recipe.output.with_name(f"{recipe.output.name}-suites")
    later = f"{command_name('accuracy')} {recipe.output} --reference {reference} --suite report"
    try:
        outcome = measure_gate(required, recipe.output, reference, recipe.video, out)
    except BadInput as missing:
        for fault in missing.faults:
            logger.warning("the benchmarks are not measured: %s", fault)
        logger.warning("later: %s", later)
        return True
    except (ServerDied, HarnessFailed) as failed:
        logger.error("%s", failed)
        logger.error("to go on: %s --out %s", later, out)
        outcome = {"passed": False, "reason": shortened(failed)}
    manifest = read_manifest(recipe.output)
    assert manifest is not None
    passed = bool(outcome["passed"])
    gate = dict(manifest.gate) | {"suites": outcome}
    if not passed:
        missed = [*gate.get("missed", []), f"the published benchmarks: see {out}"]
        gate |= {"passed": False, "missed": missed}
    write_manifest(recipe.output, dataclasses.replace(manifest, gate=gate))
    return passed
