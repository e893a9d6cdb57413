"""The command line of the front doors: `[RECIPE] [key=value …]`."""

from __future__ import annotations

from pathlib import Path

from checkpoint.command import command_parser, parse_command
from checkpoint.faults import main
from checkpoint.libraries import prepare_libraries


def front_door(module: str, doc: str | None, default: str) -> None:
    """Run the recipe of the command line and exit with its status.

    Args:
        module: The module that is run, `quantize.fp8`.
        doc: Its docstring, shown by `--help` above the fields of a recipe.
        default: The recipe below recipes/ that is run if the command line names none.
    """
    main(lambda: _run(module, doc, default))


def _run(module: str, doc: str | None, default: str) -> int:
    from recipes.loading import SHIPPED, load_recipe
    from recipes.reference import render_fields

    parser = command_parser(module, f"{(doc or '').rstrip()}\n\nFields:\n{render_fields()}")
    parser.add_argument("arguments", nargs="*", metavar="RECIPE|key=value")
    arguments = parse_command(parser).arguments
    path = SHIPPED / default
    if arguments and "=" not in arguments[0]:
        path = Path(arguments[0])
        arguments = arguments[1:]
    recipe = load_recipe(path, arguments)
    # torch and ModelOpt take seconds to import; a mistake in a recipe is reported before.
    prepare_libraries()
    from pipeline.run import run

    return run(recipe)
