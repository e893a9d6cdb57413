"""What all commands have in common: their names, the parser with `-v` and `-q`, and logging set up
by them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoint.log import add_verbosity_options, set_up_logging

_NAMES: dict[str, str] = {}
"""What the user of this process calls a command, by module; empty where that is `python -m`."""

_PYTHON_M = re.compile(r"python -m ([\w.]+\w)")


def use_command_names(names: Mapping[str, str]) -> None:
    """Let help and messages name commands otherwise than `python -m MODULE`.

    Args:
        names: Such as `hybridquant verify`, by module.
    """
    _NAMES.update(names)


def command_name(module: str) -> str:
    """Return how the user of this process runs a module: `hybridquant verify`, for one who has
    begun with `hybridquant`, and otherwise `python -m export.verify`.
    """
    return _NAMES.get(module, f"python -m {module}")


def command_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command.

    Args:
        module: The module that is run, `export.verify`.
        doc: Its docstring: the first paragraph describes the command, the rest stands below the
            options. Every `python -m MODULE` in it is shown as the user would type it.
    """
    shown = _PYTHON_M.sub(lambda found: command_name(found[1]), (doc or "").strip())
    first, _, rest = shown.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=command_name(module),
        description=first,
        epilog=rest.strip("\n") or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.register("type", Path, _path)
    add_verbosity_options(parser)
    return parser


def _path(text: str) -> Path:
    """Return the path that an option gives; an empty one would be the current directory.

    Raises:
        argparse.ArgumentTypeError: It is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("is empty (give a path)")
    return Path(text)


def parse_command(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the command line and set up logging as it says.

    Options may stand anywhere. A plain `parse_args` gives a list of words such as `key=value` those
    before the first option alone, and refuses the others. `--` ends the options, which
    `parse_intermixed_args` of Python 3.11 does not know.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    parse = parser.parse_args if "--" in arguments else parser.parse_intermixed_args
    parsed = parse(arguments)
    set_up_logging(parsed.verbose, parsed.quiet)
    return parsed
