"""How bad input is reported: a fault names the thing, what is wrong and the remedy; all faults are
raised at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_SHOWN = 50
"""Faults that a command prints before it counts the rest."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with the input.

    Attributes:
        where: The file, tensor, field or sample that is wrong.
        what: What is wrong with it, with the value found and what is allowed.
        remedy: What the user can do about it.
    """

    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}"
        return f"{text} ({self.remedy})" if self.remedy else text


class BadInput(Exception):
    """Raised for everything that ends a command with exit status 2; carries every fault found."""

    def __init__(self, *faults: Fault) -> None:
        self.faults = faults
        super().__init__("\n".join(str(fault) for fault in faults))


def raise_if_any(faults: Iterable[Fault]) -> None:
    """Raise one `BadInput` with all `faults`; do nothing when there are none."""
    found = tuple(faults)
    if found:
        raise BadInput(*found)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a remedy that names the valid choice nearest to `name`, or all of them if none is
    near.
    """
    import difflib

    choices = sorted(valid)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"choose from {', '.join(choices)}"


def main(run: Callable[[], int]) -> None:
    """Run a command and leave the process with its exit status.

    Bad input is printed to stderr and ends with 2, and so does an error of the operating system,
    such as a full disk, which only the user can fix. Any other exception is a defect of ours and
    keeps its traceback.
    """
    try:
        status = run()
    except BadInput as bad:
        _print_faults(bad.faults)
        status = 2
    except OSError as error:
        _print_system_error(error)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def _print_faults(faults: tuple[Fault, ...]) -> None:
    for fault in faults[:_SHOWN]:
        print(f"error: {fault}", file=sys.stderr)
    more = len(faults) - _SHOWN
    if more > 0:
        print(f"error: … and {more} more", file=sys.stderr)


def _print_system_error(error: OSError) -> None:
    where = error.filename or "output"
    what = os.strerror(error.errno) if error.errno else str(error)[:200]
    remedy = "free some space, or choose another output"
    print(f"error: {where}: {what} ({remedy})", file=sys.stderr)
