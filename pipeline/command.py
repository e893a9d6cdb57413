"""The command line of the front doors: `[RECIPE] [key=value …]`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.command import command_name, command_parser, parse_command
from checkpoint.faults import BadInput, Fault, main, raise_if_any, raise_on_termination, shortened
from checkpoint.libraries import prepare_libraries
from checkpoint.memory import let_segments_grow
from pipeline.first_checks import first_faults

if TYPE_CHECKING:
    from recipes.schema import Recipe


def front_door(
    module: str, doc: str | None, default: str, formats: Collection[str] = (), distils: bool = False
) -> None:
    """Run the recipe of the command line and exit with its status.

    Args:
        module: The module that is run, `quantize.fp8`.
        doc: Its docstring, shown by `--help` above the fields of a recipe.
        default: The recipe below recipes/ that is run if the command line names none.
        formats: Of these, the recipe must give its linears at least one; any if empty.
        distils: Whether the recipe must distil, or must not.
    """
    main(lambda: _run(module, doc, default, formats, distils))


def _run(
    module: str, doc: str | None, default: str, formats: Collection[str], distils: bool
) -> int:
    from recipes.loading import SHIPPED, load_recipe
    from recipes.reference import render_fields

    parser = command_parser(module, f"{(doc or '').rstrip()}\n\nFields:\n{render_fields()}")
    arguments_help = "a recipe, if it is not the default one, and fields of it"
    parser.add_argument("arguments", nargs="*", metavar="RECIPE|key=value", help=arguments_help)
    arguments = parse_command(parser).arguments
    path, fields = split_recipe(arguments)
    recipe = load_recipe(path or SHIPPED / default, fields)
    raise_if_any(purpose_faults(recipe, module, formats, distils))
    # torch and ModelOpt take seconds to import; what can be told without them is told before.
    raise_if_any(first_faults(recipe))
    raise_on_termination()
    if recipe.distill is not None:
        let_segments_grow()
    prepare_libraries()
    from pipeline.run import run

    return run(recipe)


def split_recipe(words: list[str]) -> tuple[Path | None, list[str]]:
    """Return the recipe among the words of a command line, and the others.

    Raises:
        BadInput: There are two.
    """
    recipes = [word for word in words if "=" not in word]
    if len(recipes) > 1:
        first, second = (shortened(repr(word)) for word in recipes[:2])
        raise BadInput(Fault(second, f"is a second recipe, after {first}", "give key=value"))
    if recipes == [""]:
        raise BadInput(Fault("''", "is not a recipe and not key=value", "leave it out"))
    fields = [word for word in words if "=" in word]
    return (Path(recipes[0]) if recipes else None), fields


def purpose_faults(
    recipe: Recipe, module: str, formats: Collection[str], distils: bool
) -> Iterator[Fault]:
    """Yield what keeps a recipe from doing what the command's name says.

    Args:
        recipe: The recipe.
        module: The command.
        formats: As in `front_door`.
        distils: As in `front_door`.
    """
    command = command_name(module)
    if distils and recipe.distill is None:
        what = f"is missing, and {command} distils"
        others = f"{command_name('quantize.fp8')} or {command_name('quantize.nvfp4')}"
        yield Fault("distill", what, f"add the section, or run {others}")
    if not distils and recipe.distill is not None:
        what = f"is given, and {command} does not distil"
        remedy = f"run {command_name('quantize.qad')}, or give distill=null"
        yield Fault("distill", what, remedy)
    given = {rule.format for rule in recipe.quantize.layers}
    if recipe.quantize.auto is not None:
        given.update(recipe.quantize.auto.formats)
    if formats and given.isdisjoint(formats):
        what = f"has no rule with {' or '.join(formats)}, which {command} is for"
        yield Fault("quantize.layers", what, "add one, or run the command of the recipe's format")
