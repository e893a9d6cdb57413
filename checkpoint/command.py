"""What all commands have in common: the parser with `-v` and `-q`, and logging set up by them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

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
    add_verbosity_options(parser)
    return parser


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
