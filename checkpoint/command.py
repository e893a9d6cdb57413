"""What all commands have in common: the parser with `-v` and `-q`, and logging set up by them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from checkpoint.log import add_verbosity_options, set_up_logging


def command_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command.

    Args:
        module: The module that is run, `export.verify`.
        doc: Its docstring: the first paragraph describes the command, the rest stands below the
            options.
    """
    first, _, rest = (doc or "").strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
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
    """Parse the command line and set up logging as it says."""
    parsed = parser.parse_args(arguments)
    set_up_logging(parsed.verbose, parsed.quiet)
    return parsed
