"""Verifies an exported directory from its files alone, against its config, vLLM's rules and the
source.

    python -m export.verify DIR [--source BF16_DIR] [--load] [--json]

The files beside the weights, such as tokenizer and chat template, must be sound, and with --source
the same as there, README aside. hybridquant.json records the SHA-256 of every file. With --source,
weights are compared with it, and a few prompts show whether input scales fit; of a source in
float32 or float16, with its values in BF16. How near weights must be follows from what
hybridquant.json says was done to them: see export/closeness.py. Documents and pictures may be added
at any time. What could not be checked is said in one line, all faults are shown in one table. Exit
status: 0 without faults, 1 with faults, 2 when DIR is not a checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from checkpoint.command import command_parser, parse_command
from checkpoint.config import absence_faults, read_config
from checkpoint.faults import Fault, main, raise_if_any
from checkpoint.libraries import prepare_libraries
from checkpoint.weight_files import checkpoint_faults

if TYPE_CHECKING:
    from export.checks import Verification

_SHOWN = 200
"""Faults in the table; the rest is counted."""

# export.checks is imported in functions: it imports ModelOpt, which takes seconds, and which a
# command has to prepare first.


def verify(directory: Path, source: Path | None = None) -> list[Fault]:
    """Verify an exported directory.

    Args:
        directory: The exported directory.
        source: The BF16 checkpoint that it was made from; adds the comparison of weights, of input
            scales and of the files beside them.

    Returns:
        Every fault found; an empty list for a sound directory.

    Raises:
        BadInput: There is no config.json, or the source is not a checkpoint of a known model.
    """
    return verification(directory, source).faults


def verification(
    directory: Path, source: Path | None = None, run_prompts: bool = True
) -> Verification:
    """Verify an exported directory, and say what could not be checked.

    Args:
        directory: The exported directory.
        source: As for `verify`.
        run_prompts: Whether prompts are run through the source for its input ranges.

    Raises:
        BadInput: As `verify`.
    """
    from export.checks import inspect

    return inspect(directory, source, run_prompts)


def first_faults(directory: Path, source: Path | None) -> Iterator[Fault]:
    """Yield what keeps a directory from being looked at: told before ModelOpt is imported.

    Args:
        directory: As for `verify`.
        source: As for `verify`.
    """
    yield from absence_faults(directory)
    if source is not None:
        yield from checkpoint_faults(source, must_be_bf16=True)


def show_verification(directory: Path, found: Verification) -> None:
    """Print what was not checked in one line, and all faults in one table."""
    if found.unchecked:
        line = f"{directory}: not checked: {'; '.join(found.unchecked)}"
        Console(stderr=bool(found.faults)).print(
            line, highlight=False, markup=False, soft_wrap=True
        )
    show_faults(directory, found.faults)


def show_faults(directory: Path, faults: list[Fault]) -> None:
    """Print all faults in one table, or that there are none."""
    console = Console(stderr=bool(faults))
    if not faults:
        console.print(f"{directory}: verified, no faults", highlight=False)
        return
    number = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    table = Table(title=f"{directory}: {number}", title_justify="left")
    for column in ("where", "what", "remedy"):
        table.add_column(column, overflow="fold")
    for fault in faults[:_SHOWN]:
        table.add_row(*(escape(part) for part in (fault.where, fault.what, fault.remedy)))
    console.print(table)
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
    load_help = "if it is sound, load it with vLLM, list its kernels and ask three questions"
    parser.add_argument("--load", action="store_true", help=load_help)
    parser.add_argument("--json", action="store_true", help="print the faults as JSON")
    arguments = parse_command(parser)
    raise_if_any(first_faults(arguments.directory, arguments.source))
    prepare_libraries()
    found = verification(arguments.directory, arguments.source)
    kernels: dict[str, int] = {}
    lines: list[str] = []
    if arguments.load and not found.faults:
        from export.loaded import kernel_lines, kernels_of, load_and_ask

        loaded = load_and_ask(arguments.directory)
        found.faults += loaded.faults
        kernels = kernels_of(loaded.layers)
        lines = kernel_lines(read_config(arguments.directory), loaded.layers)
    if arguments.json:
        answer = {
            "directory": str(arguments.directory),
            "faults": [dataclasses.asdict(fault) for fault in found.faults],
            "not_checked": found.unchecked,
            "kernels": kernels,
        }
        print(json.dumps(answer, indent=2))
    else:
        for line in lines:
            print(f"{arguments.directory}: {line}")
        show_verification(arguments.directory, found)
    return 1 if found.faults else 0


if __name__ == "__main__":
    main(_run)
