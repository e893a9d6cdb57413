"""The recipe's section `calibrate`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from calibrate.sources.source import AnySource
from calibrate.sources.synthetic.source import SyntheticSource
from checkpoint.settings import Section

Sources = Annotated[tuple[AnySource, ...], Field(min_length=1)]
"""Where samples come from, mixed by weight."""

DEFAULT_SOURCES: Sources = (SyntheticSource(type="synthetic"),)


class Calibrate(Section):
    """What the activation ranges are taken from."""

    sources: Sources = DEFAULT_SOURCES
    """Where samples come from, mixed by weight."""
    samples: Annotated[int, Field(ge=1)] = 1024
    """Prompts to calibrate on; 1,024 as published (arXiv 2511.03929)."""
    seed: int = 0
    """Draws the synthetic samples and mixes the sources."""
    max_length: Annotated[int, Field(ge=16)] = 16384
    """Longest prompt in tokens, after EVS; longer samples are skipped."""
    max_skipped: Annotated[int, Field(ge=0)] = 0
    """Bad samples to skip and count before the run stops."""
