"""Datasets of the Hugging Face Hub, streamed, and local dataset directories."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from calibrate.samples import Sample, Skipped, sample_from_row, usable_samples
from calibrate.sources.source import Source, file_or_folder_faults, register_source
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.memory import is_out_of_memory

_ROWS = (
    ".parquet",
    ".arrow",
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".txt",
    ".gz",
    ".zst",
    ".zip",
    ".tar",
)
"""How names of files end that hold rows of a local dataset, or say which files do."""


@register_source
class HubSource(Source):
    """A Hugging Face dataset by name, streamed, or a local dataset directory."""

    type: Literal["hub"]
    name: str
    """Name on the Hub, or a directory that `load_dataset` or `load_from_disk` reads."""
    split: str = "train"
    """Which split to read."""
    subset: str | None = None
    """The dataset's configuration, for datasets with several."""

    def read(self, samples: int, seed: int, skipped: Skipped) -> Iterator[Sample]:
        """Yield the rows of the split, in order."""
        return read_hub(self.name, split=self.split, subset=self.subset, skipped=skipped)

    def count(self, samples: int) -> int:
        """Rows by the dataset's metadata, at most `samples`."""
        return count_dataset(self.name, samples, split=self.split, subset=self.subset)

    def faults(self) -> Iterator[Fault]:
        """Yield a fault when a name that can only be a path names nothing; the Hub is not asked."""
        if self.name.startswith((".", "/", "~")):
            yield from file_or_folder_faults(Path(self.name))

    def files(self) -> list[Path]:
        """Those of a local directory or file; the Hub's are not known here."""
        return local_files(Path(self.name))


def local_files(path: Path) -> list[Path]:
    """The files of rows at a path: itself, or those in a folder; empty if there is none."""
    if path.is_file():
        return [path]
    found = []
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix.lower() in _ROWS:
            found.append(file)
    return found


def read_hub(
    name: str,
    *,
    split: str = "train",
    subset: str | None = None,
    streaming: bool = True,
    skipped: Skipped | None = None,
) -> Iterator[Sample]:
    """Yield the rows of a dataset that has a `messages` column.

    Media are given in the parts themselves, as in JSON Lines, or in columns `images` or `image`,
    `videos` or `video`: then the n-th image part without a URL is the n-th image of its row, and
    there must be as many. Columns are not decoded: the original bytes are passed on as `data:`
    URLs.

    Args:
        name: Name on the Hub, or a directory that `load_dataset` or `load_from_disk` reads.
        split: Which split.
        subset: The dataset's configuration, for datasets with several.
        streaming: Whether to read rows as they come instead of downloading the dataset first.
        skipped: Takes the bad rows; without it, the first bad row raises.

    Raises:
        BadInput: The dataset cannot be opened or read, or contains no usable row, or `skipped` is
            full.
    """
    skipped = skipped if skipped is not None else Skipped()
    base = Path.cwd()
    if Path(name).exists():
        base = Path(name) if Path(name).is_dir() else Path(name).parent

    def parse(number: int, row: dict[str, Any]) -> Sample:
        return sample_from_row(row, name, str(number), base)

    none = Fault(name, f"split {split} contains no usable sample", "it needs a messages column")
    rows = enumerate(_rows(name, split, subset, streaming))
    yield from usable_samples(rows, parse, skipped, none)


def dataset_rows(name: str, split: str = "train") -> Iterator[dict[str, Any]]:
    """Yield the rows of a local file or folder that `datasets` reads."""
    return _rows(name, split, None, streaming=True)


def count_dataset(name: str, most: int, split: str = "train", subset: str | None = None) -> int:
    """Count the rows of a split by its metadata, up to `most`; `most` where it does not say.

    Args:
        name: As for `read_hub`.
        most: Rows to count at most.
        split: Which split.
        subset: The dataset's configuration.
    """
    try:
        rows = _rows_by_metadata(name, split, subset)
    except Exception as error:  # reading the dataset says what is wrong with it
        if is_out_of_memory(error):
            raise
        return most
    return most if rows is None else min(rows, most)


def _rows_by_metadata(name: str, split: str, subset: str | None) -> int | None:
    import datasets
    from pyarrow import parquet

    if _is_saved(name):
        data: Any = datasets.load_from_disk(name)
        return int(data[split].num_rows if isinstance(data, dict) else data.num_rows)
    if Path(name).is_file():
        files = [name]
    else:
        builder = datasets.load_dataset_builder(name, subset)
        described = (builder.info.splits or {}).get(split)
        if described is not None and described.num_examples:
            return int(described.num_examples)
        files = [str(file) for file in builder.config.data_files[split]]
    if not all(Path(file).is_file() and file.lower().endswith(".parquet") for file in files):
        return None
    return sum(parquet.ParquetFile(file).metadata.num_rows for file in files)


def _is_saved(name: str) -> bool:
    """Whether a directory is one that `save_to_disk` wrote."""
    saved = ("dataset_info.json", "dataset_dict.json")
    return any((Path(name) / file).exists() for file in saved)


def _rows(name: str, split: str, subset: str | None, streaming: bool) -> Iterator[dict[str, Any]]:
    # A dataset's own files and the network can raise anything; all of it is bad input here.
    try:
        dataset = _open_dataset(name, split, subset, streaming)
        for row in dataset:
            yield dict(row)
    except BadInput:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = shortened(f"{type(error).__name__}: {error}")
        what = f"split {split} cannot be read: {reason}"
        raise BadInput(Fault(name, what, "check name, split and network")) from None


def _open_dataset(name: str, split: str, subset: str | None, streaming: bool) -> Any:
    """Open a split as an iterable dataset whose media are left as bytes."""
    import datasets  # slow to import, and only this source needs it

    if _is_saved(name):
        data: Any = datasets.load_from_disk(name)
        if isinstance(data, datasets.DatasetDict):
            data = data[split]
    elif Path(name).is_file():
        builder = "parquet" if name.lower().endswith(".parquet") else "json"
        files = {split: str(name)}
        data = datasets.load_dataset(builder, data_files=files, split=split, streaming=streaming)
    else:
        data = datasets.load_dataset(name, subset, split=split, streaming=streaming)
    if not isinstance(data, datasets.IterableDataset):
        data = data.to_iterable_dataset()
    if data.features is not None:
        data = data.cast(_undecoded(data.features))
    return data


def _undecoded(feature: Any) -> Any:
    """The features with media left as bytes; `decode(False)` would skip JSON columns too."""
    import datasets

    if isinstance(feature, dict):
        return type(feature)({key: _undecoded(value) for key, value in feature.items()})
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_undecoded(feature.feature))
    if isinstance(feature, datasets.Image | datasets.Video):
        return replace(feature, decode=False)
    return feature
