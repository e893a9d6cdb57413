"""Reads environment variables that turn something on or off."""

from __future__ import annotations

import logging
import os

_VALUES = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}

_logger = logging.getLogger("vllm.hybridquant")


def is_on(variable: str, default: bool) -> bool:
    """Return whether an environment variable turns something on.

    Another value than 1, true, yes, on, 0, false, no and off is logged as a warning, and the
    default applies.

    Args:
        variable: Its name.
        default: What applies where it is not set, or empty.
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    value = _VALUES.get(text.lower())
    if value is None:
        _logger.warning("%s=%.40s is neither 1 nor 0: %d applies", variable, text, default)
        return default
    return value
