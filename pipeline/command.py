"""The command line of the front doors: `[RECIPE] [key=value …]`, read before anything heavy is
imported.
"""

from __future__ import annotations

import sys
from pathlib import Path

from checkpoint.faults import main
from recipes.schema import load_recipe


def front_door(doc: str, default: str) -> None:
    """Run the recipe of the command line and exit with its status.

    Args:
        doc: Printed for `--help`.
        default: The recipe, below recipes/, where the command line names none.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(doc.strip())
        return
    named = bool(arguments) and "=" not in arguments[0]
    path = Path(arguments[0]) if named else Path(__file__).parents[1] / "recipes" / default
    main(lambda: _run(path, arguments[1:] if named else arguments))


def _run(path: Path, overrides: list[str]) -> int:
    recipe = load_recipe(path, overrides)
    from pipeline.run import (
        run,
    )  # torch and ModelOpt take ten seconds: a typing error in a recipe need not wait for them

    return run(recipe)
