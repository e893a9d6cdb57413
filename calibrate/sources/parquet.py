"""Parquet files and folders of OpenAI chat messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from calibrate.samples import Sample, Skipped
from calibrate.sources.hub import count_dataset, local_files, read_hub
from calibrate.sources.source import Source, file_or_folder_faults, register_source
from checkpoint.faults import Fault


@register_source
class ParquetSource(Source):
    """A Parquet file, or a folder of them, with a `messages` column."""

    type: Literal["parquet"]
    path: Path
    """The file or the folder."""
    split: str = "train"
    """Which split of a folder to read."""

    def read(self, samples: int, seed: int, skipped: Skipped) -> Iterator[Sample]:
        """Yield the rows, in order."""
        return read_hub(str(self.path), split=self.split, skipped=skipped)

    def count(self, samples: int) -> int:
        """Rows by the files' metadata, at most `samples`."""
        return count_dataset(str(self.path), samples, split=self.split)

    def faults(self) -> Iterator[Fault]:
        """Yield a fault when there is no such file or folder."""
        yield from file_or_folder_faults(self.path)

    def files(self) -> list[Path]:
        """The file, or those of the folder."""
        return local_files(self.path)
