"""Sends what ModelOpt prints to the log, so that it does not mix with a command's result.

Upstream trap of ModelOpt 0.47: `mtq.quantize` prints "Inserted N quantizers" and the progress of
its algorithms to standard output, and no argument turns that off.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from checkpoint.log import get_logger

logger = get_logger(__name__)


@contextlib.contextmanager
def printed_to_log() -> Iterator[None]:
    """Log each line printed in the body at debug level. Use it around a single call of ModelOpt."""
    lines = _Lines()
    with contextlib.redirect_stdout(lines):
        try:
            yield
        finally:
            lines.end()


class _Lines(io.TextIOBase):
    """A text stream that logs every finished line."""

    def __init__(self) -> None:
        self._unfinished = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *finished, self._unfinished = (self._unfinished + text).split("\n")
        for line in finished:
            self._log(line)
        return len(text)

    def end(self) -> None:
        """Log what was printed without a line break at its end."""
        self._log(self._unfinished)
        self._unfinished = ""

    def _log(self, line: str) -> None:
        if line.strip():
            logger.debug("ModelOpt: %s", line.rstrip())
