"""How bad input is reported: a fault names the thing, what is wrong and the remedy; all faults are
raised at once.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

_SHOWN = 50
"""Faults that a command prints before it counts the rest."""

_ALIKE = 5
"""The same, of faults that only differ in where they are."""

FIRST_SPEAKS_SECONDS = 5.0
"""How long the other processes of a launcher leave a fault to the first one."""

FOREIGN = 200
"""Characters of foreign text, such as a path or a server's answer, that a message may contain."""

_LONGEST_WORD = 120
"""Characters of foreign text without a space that are shown: what is longer is encoded data."""

_LONGEST_PART = 600
"""Characters of each part of a fault, whatever it was made of."""


def shortened(value: object, limit: int = FOREIGN) -> str:
    """Return foreign text fit for a message: one line, printable, at most `limit` characters.

    Encoded data, such as a picture in base64, is cut to its beginning. Of a text that is still too
    long, beginning and end are kept: the reason of an error is in one of the two.

    Args:
        value: Any value; its `str` is shown.
        limit: Most characters of the result.
    """
    text = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    text = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()
    if len(text) <= limit:
        return text
    text = re.sub(rf"\S{{{_LONGEST_WORD},}}", _beginning, text)
    if len(text) <= limit:
        return text
    end = limit // 3
    return f"{text[: limit - end - 3]} … {text[-end:]}"


def _beginning(word: re.Match[str]) -> str:
    return f"{word[0][:40]}…"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with the input.

    Foreign text in it is passed through `shortened` by whoever makes the fault. Each part is bound
    here as well, so that a sample or a file can never fill the screen.

    Attributes:
        where: The file, tensor, field or sample that is wrong.
        what: What is wrong with it, with the value found and what is allowed.
        remedy: What the user can do about it.
    """

    where: str
    what: str
    remedy: str = ""

    def __post_init__(self) -> None:
        for name in ("where", "what", "remedy"):
            text = getattr(self, name)
            if len(text) > _LONGEST_PART:
                object.__setattr__(self, name, shortened(text, _LONGEST_PART))

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
        _let_first_process_speak()
        _print_faults(bad.faults)
        status = 2
    except OSError as error:
        _print_system_error(error)
        status = 2
    except Terminated as terminated:
        print(f"terminated by {terminated}", file=sys.stderr)
        status = 128 + terminated.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    sys.exit(status)


class Terminated(KeyboardInterrupt):
    """Raised by `raise_on_termination`; everything that handles Ctrl-C handles it alike."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def raise_on_termination() -> None:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does, so that it leaves no half result.

    SIGHUP stays ignored where it is, as under `nohup`.
    """
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _terminate)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(number)


def is_first_process() -> bool:
    """Return whether this process is the first that a launcher started, or started without one: the
    one whose messages the user reads.
    """
    return os.environ.get("RANK", "0") == "0"


def _let_first_process_speak() -> None:
    """Wait on all processes of a launcher but the first.

    Most faults are found by all of them alike. The launcher stops the others as soon as one has
    ended, so that only what the first does not find is printed by another.
    """
    if not is_first_process():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(FIRST_SPEAKS_SECONDS)


def _print_faults(faults: tuple[Fault, ...]) -> None:
    # Several sections of a recipe may find the same fault of one source.
    different = list(dict.fromkeys(faults))
    # One cause, such as the chat template, may make every sample unusable.
    alike: Counter[tuple[str, str]] = Counter()
    shown = []
    for fault in different:
        kind = (fault.what, fault.remedy)
        alike[kind] += 1
        if alike[kind] <= _ALIKE:
            shown.append(fault)
    for fault in shown[:_SHOWN]:
        print(f"error: {fault}", file=sys.stderr)
    more = len(different) - len(shown[:_SHOWN])
    if more > 0:
        print(f"error: … and {more} more", file=sys.stderr)


_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another output",
    errno.EDQUOT: "free some space, or choose another output",
    errno.EFBIG: "choose an output on a disk that takes files of this size",
    errno.EROFS: "choose another output",
    errno.EACCES: "change its permissions, or give another path",
    errno.EPERM: "change its permissions, or give another path",
    errno.ENOENT: "check the path, and restore it if it was there when the command began",
    errno.ENOTDIR: "a part of its path is a file: give another path",
    errno.EISDIR: "it is a directory: give a file",
    errno.EEXIST: "remove it, or choose another output",
    errno.ENOTEMPTY: "another program writes there: choose another output",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "its symbolic links form a circle: give another path",
    errno.EBUSY: "another program uses it: end that program",
    errno.ETXTBSY: "another program uses it: end that program",
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
    errno.ENFILE: "close other programs: the system has too many open files",
    errno.ENOMEM: "end what else uses memory",
    errno.EIO: "the disk or the network drive fails: check it, then run the command again",
    errno.ESTALE: "the network drive fails: mount it again, then run the command again",
    errno.EPIPE: "the program that reads the output has ended",
    errno.EADDRINUSE: "give another port",
    errno.ECONNREFUSED: "start the server, or give another address",
}
"""What the user can do about an error of the operating system."""


def _print_system_error(error: OSError) -> None:
    where = shortened(error.filename or "the operating system")
    what = os.strerror(error.errno) if error.errno else shortened(error)
    remedy = _REMEDIES.get(error.errno or 0, "fix it, then run the command again")
    print(f"error: {where}: {what} ({remedy})", file=sys.stderr)
