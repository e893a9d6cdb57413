"""Writes the tiny checkpoint, whose tensors have the released layout at a thousandth of the size.

    python -m tiny OUT
    python -m tiny OUT --untrained

With --untrained its weights are random. OUT must not exist.
"""

from __future__ import annotations

from checkpoint.command import command_parser, parse_command
from checkpoint.faults import main
from checkpoint.other_weights import SINGLE
from tiny.checkpoint import write_tiny


def _run() -> int:
    parser = command_parser("tiny", __doc__)
    parser.add_argument("out", metavar="OUT", help="directory to write; must not exist")
    parser.add_argument(
        "--untrained", action="store_true", help="random weights instead of the trained ones"
    )
    arguments = parse_command(parser)
    config = write_tiny(arguments.out, trained=not arguments.untrained)
    size = (config.directory / SINGLE).stat().st_size / 1e6
    print(f"{config.directory}: {len(config.pattern)} layers, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    main(_run)
