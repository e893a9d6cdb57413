"""Checks environment variables that vLLM reads for a server: it ends at a value that is no number,
some of them a minute after the start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from checkpoint.faults import Fault, shortened
from serve.command import CPU_SPACE, FETCHES, MEDIA_THREADS, REDIRECTS

PLUGINS_VARIABLE = "VLLM_PLUGINS"
"""vLLM's variable for the names of plug-ins, with commas between them; all where it is not set."""

PLUGIN_NAME = "hybridquant_reference_kernels"
"""The plug-in's name in plugin/pyproject.toml."""

WHOLE_NUMBERS = {
    CPU_SPACE: 0,
    MEDIA_THREADS: 1,
    FETCHES: 0,
    REDIRECTS: 0,
    "VLLM_IMAGE_FETCH_TIMEOUT": 1,
    "VLLM_VIDEO_FETCH_TIMEOUT": 1,
    "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": 0,
    "VLLM_MAX_IMAGE_PIXELS": 0,
    "VLLM_PORT": 0,
}
"""Variables that vLLM reads as whole numbers, and the least that it can use."""


def variable_faults() -> Iterator[Fault]:
    """Yield faults of variables of this process, which the server inherits."""
    for name, least in WHOLE_NUMBERS.items():
        text = os.environ.get(name)
        if text is not None and not _is_whole(text, least):
            what = f"is {shortened(repr(text), 60)}"
            yield Fault(name, what, f"give a whole number of at least {least}, or unset it")
    plugins = os.environ.get(PLUGINS_VARIABLE)
    if plugins is not None and PLUGIN_NAME not in plugins.split(","):
        what = f"is {shortened(repr(plugins), 60)}, so that vLLM loads no plug-in of hybridquant"
        yield Fault(PLUGINS_VARIABLE, what, f"add {PLUGIN_NAME}, or unset it")


def _is_whole(text: str, least: int) -> bool:
    try:
        return int(text) >= least
    except ValueError:
        return False
