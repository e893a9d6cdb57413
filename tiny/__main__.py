"""Writes the tiny checkpoint.

python -m tiny OUT [--untrained]
"""

from __future__ import annotations

import argparse

from checkpoint.faults import main
from checkpoint.files import SINGLE
from tiny.checkpoint import write_tiny


def _run() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tiny", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("out", metavar="OUT", help="directory to write; must not exist")
    parser.add_argument(
        "--untrained", action="store_true", help="random weights instead of the trained ones"
    )
    arguments = parser.parse_args()
    config = write_tiny(arguments.out, trained=not arguments.untrained)
    size = (config.directory / SINGLE).stat().st_size / 1e6
    print(f"{config.directory}: {len(config.pattern)} layers, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    main(_run)
