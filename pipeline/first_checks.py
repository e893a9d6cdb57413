"""The first checks of a run: whether what its recipe names is there, told within a second.

Does not import torch, which takes a second, or ModelOpt, which takes six.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from checkpoint.faults import Fault
from checkpoint.run_state import place_faults
from checkpoint.weight_files import checkpoint_faults
from recipes.schema import TINY, Recipe
from serve.preflight import dtype_faults


def first_faults(recipe: Recipe) -> list[Fault]:
    """Return the faults of a recipe's model, output and files of samples.

    What is inside them is checked when they are opened (`pipeline.job.open_job`).
    """
    faults = list(_model_faults(recipe))
    faults += place_faults(recipe.output)
    faults += _inside_faults(recipe)
    for source in recipe.sources():
        faults += source.faults()
    return faults


def _inside_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield a fault of an output that would become a part of the model."""
    if recipe.model == TINY:
        return
    source = Path(recipe.model).resolve()
    if recipe.output.absolute().parent.resolve().is_relative_to(source):
        what = f"lies inside the source, {source}"
        yield Fault(str(recipe.output), what, "give an output beside it")


def _model_faults(recipe: Recipe) -> Iterator[Fault]:
    if recipe.model == TINY:
        return
    directory = Path(recipe.model)
    faults = checkpoint_faults(directory, must_be_bf16=True)
    yield from faults
    if not faults and recipe.accuracy.suites is not None:
        # The benchmarks are asked of a server at the end, which does not take all that a run takes.
        yield from dtype_faults(directory)
