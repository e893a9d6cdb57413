"""How bad input is reported: one fault names the thing and the remedy, all faults are raised at
once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# What the system refuses for reasons that only the user can mend: disk full, quota, size limit,
# read-only, no right.
_USERS_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


@dataclass(frozen=True)
class Fault:
    """One thing wrong with the input.

    Attributes:
        where: The file, tensor, field or sample that is wrong.
        what: What is wrong with it, with the value found and what is allowed.
        remedy: What the user can do about it.
    """

    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" ({self.remedy})" if self.remedy else "")


class BadInput(Exception):
    """Raised for everything that ends a command with exit status 2; carries every fault found, not
    the first.
    """

    def __init__(self, *faults: Fault) -> None:
        self.faults = faults
        super().__init__("\n".join(str(fault) for fault in faults))


def raise_if_any(faults: Iterable[Fault]) -> None:
    """Raise one `BadInput` with all `faults`; do nothing when there are none."""
    found = tuple(faults)
    if found:
        raise BadInput(*found)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a remedy that names the valid choice nearest to `name`, or all of them when none is
    near.
    """
    import difflib

    choices = sorted(valid)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"


def main(run: Callable[[], int]) -> None:
    """Run a command and leave the process with its exit status: bad input is printed to stderr and
    exits 2.

    A full disk is the user's to mend, so it is bad input too. Any other exception is a defect of
    ours and keeps its traceback.
    """
    try:
        sys.exit(run())
    except BadInput as bad:
        shown = bad.faults[:50]
        for fault in shown:
            print(f"error: {fault}", file=sys.stderr)
        if len(bad.faults) > len(shown):
            print(f"error: … and {len(bad.faults) - len(shown)} more", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _USERS_ERRORS:
            raise
        print(f"error: {error.filename or 'output'}: {os.strerror(error.errno)}"
              " (free some space, or choose another output)", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
