"""Logging of every command: messages go to stderr, results go to stdout."""

from __future__ import annotations

import argparse
import logging
import sys

NAMESPACE = "hybridquant"


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; `name` is its `__name__`."""
    return logging.getLogger(f"{NAMESPACE}.{name}")


def add_verbosity_options(parser: argparse.ArgumentParser) -> None:
    """Add `-v` and `-q` to a command's parser."""
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more details")
    parser.add_argument(
        "-q", "--quiet", action="count", default=0, help="log warnings and errors only"
    )


def set_up_logging(verbose: int = 0, quiet: int = 0) -> None:
    """Send the project's messages to stderr.

    Call it once, from a command. Without it, messages reach the logging of the application.

    Args:
        verbose: Number of `-v` options; from 1 on, debug messages are shown.
        quiet: Number of `-q` options; 1 leaves warnings and errors, 2 errors only.
    """
    level = logging.INFO - 10 * verbose + 10 * quiet
    logger = logging.getLogger(NAMESPACE)
    logger.setLevel(max(logging.DEBUG, min(logging.ERROR, level)))
    logger.handlers = [_handler()]
    logger.propagate = False


class _Formatter(logging.Formatter):
    """The message alone; from warnings on, after the name of its level."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if record.levelno < logging.WARNING:
            return message
        return f"{record.levelname.lower()}: {message}"


def _handler() -> logging.Handler:
    handler = None
    # RichHandler wraps and pads lines to the console's width, 80 where there is none: a file or a
    # pipe gets them as they are.
    if sys.stderr.isatty():
        handler = _rich_handler()
    if handler is None:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    return handler


def _rich_handler() -> logging.Handler | None:
    try:
        from rich.console import Console
        from rich.logging import RichHandler
    except ImportError:  # the serve environment may lack rich
        return None
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    return RichHandler(
        console=console, show_time=False, show_path=False, show_level=False, markup=False
    )
