"""The source of drawn samples, as a recipe describes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from calibrate.samples import Sample, Skipped
from calibrate.sources.source import Source, register_source


@register_source
class SyntheticSource(Source):
    """Documents, tables, charts, clips and texts drawn from a seed."""

    type: Literal["synthetic"]
    kinds: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    """Share of each kind; by default all kinds have the same share."""

    def read(self, samples: int, seed: int, skipped: Skipped) -> Iterator[Sample]:
        """Yield `samples` samples of the series of `seed`."""
        from calibrate.sources.synthetic.kinds import MIXED, synthetic

        return synthetic(self.kinds or MIXED, samples, seed)
