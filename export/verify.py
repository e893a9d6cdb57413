"""Verifies an exported directory from its files alone, against its config, vLLM's rules and the
source.

    python -m export.verify DIR [--source BF16_DIR] [--json]

The files beside the weights, such as tokenizer and chat template, must be sound, and with --source
the same as there. All faults are shown in one table. Exit status: 0 without faults, 1 with faults,
2 when DIR is not a checkpoint. Weights that a distillation has trained (hybridquant.json names
them) are not compared with the source; their number is printed. How near the others must be follows
from the calibration algorithm that hybridquant.json records: see export/closeness.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from checkpoint.command import command_parser, parse_command
from checkpoint.faults import Fault, main
from checkpoint.libraries import prepare_libraries

_SHOWN = 200
"""Faults in the table; the rest is counted."""

# export.checks is imported in functions: it imports ModelOpt, which takes seconds, and which a
# command has to prepare first.


def verify(directory: Path, source: Path | None = None) -> list[Fault]:
    """Verify an exported directory.

    Args:
        directory: The exported directory.
        source: The BF16 checkpoint that it was made from; adds the comparison of weights and of the
            files beside them.

    Returns:
        Every fault found; an empty list for a sound directory.

    Raises:
        BadInput: One of the directories is not a checkpoint of a known architecture.
    """
    from export.checks import directory_faults

    return directory_faults(directory, source)


def show_faults(directory: Path, faults: list[Fault]) -> None:
    """Print all faults in one table, or that there are none."""
    from export.checks import trained_tensors, weight_change

    console = Console(stderr=bool(faults))
    trained = trained_tensors(directory)
    if trained:
        note = "tensors were trained: how far they are from the source's is not checked"
        console.print(f"{directory}: {len(trained)} {note}", highlight=False, soft_wrap=True)
    if weight_change(directory) == "moved":
        note = "the algorithm moved the weights: tensors, rows and columns are compared with the "
        note += "source's, single weights are not"
        console.print(f"{directory}: {note}", highlight=False, soft_wrap=True)
    if not faults:
        console.print(f"{directory}: verified, no faults", highlight=False)
        return
    table = Table(title=f"{directory}: {len(faults)} faults", title_justify="left")
    for column in ("where", "what", "remedy"):
        table.add_column(column, overflow="fold")
    for fault in faults[:_SHOWN]:
        table.add_row(fault.where, fault.what, fault.remedy)
    console.print(table, markup=False)
    if len(faults) > _SHOWN:
        console.print(f"… and {len(faults) - _SHOWN} more")


def _run() -> int:
    parser = command_parser("export.verify", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--source",
        type=Path,
        metavar="BF16_DIR",
        help="compare with the checkpoint that it was made from",
    )
    parser.add_argument("--json", action="store_true", help="print the faults as JSON")
    arguments = parse_command(parser)
    prepare_libraries()
    faults = verify(arguments.directory, arguments.source)
    if arguments.json:
        found = [dataclasses.asdict(fault) for fault in faults]
        print(json.dumps({"directory": str(arguments.directory), "faults": found}, indent=2))
    else:
        show_faults(arguments.directory, faults)
    return 1 if faults else 0


if __name__ == "__main__":
    main(_run)
