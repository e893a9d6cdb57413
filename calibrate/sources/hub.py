"""Datasets of the Hugging Face Hub, streamed, and local dataset directories."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from calibrate.samples import Sample, Skipped, sample_from_row, usable_samples
from checkpoint.faults import BadInput, Fault


def read_hub(
    name: str,
    *,
    split: str = "train",
    subset: str | None = None,
    streaming: bool = True,
    skipped: Skipped | None = None,
) -> Iterator[Sample]:
    """Yield the rows of a dataset on the Hugging Face Hub, or in a local directory, that has a
    `messages` column.

    Media stand in the parts themselves, as in JSON Lines, or in columns `images` or `image`,
    `videos` or `video`: then the n-th image part without a URL is the n-th image of its row, and
    there must be as many. Columns are not
    decoded: the original bytes travel on as `data:` URLs.

    Args:
        name: Name on the Hub, or a directory that `load_dataset` or `load_from_disk` reads.
        split: Which split.
        subset: The dataset's configuration, for those with several.
        streaming: Read rows as they come instead of downloading the dataset first.
        skipped: Takes the bad rows; without it the first raises.

    Raises:
        BadInput: The dataset cannot be opened or read, or holds no usable row, or `skipped` is
            full.
    """
    skipped = skipped if skipped is not None else Skipped()
    base = Path(name) if Path(name).is_dir() else Path.cwd()
    none = Fault(name, f"split {split} holds no usable sample", "it needs a messages column")
    rows = enumerate(_rows(name, split, subset, streaming))
    yield from usable_samples(
        rows, lambda number, row: sample_from_row(row, name, str(number), base), skipped, none
    )


def _rows(name: str, split: str, subset: str | None, streaming: bool) -> Iterator[dict[str, Any]]:
    import datasets  # slow to import, and JSON Lines do without

    # Anything may come out of a dataset's own files and of the network behind them; all of it is
    # bad input here.
    try:
        if (Path(name) / "dataset_info.json").exists() or (
            Path(name) / "dataset_dict.json"
        ).exists():
            data = datasets.load_from_disk(name)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(name, subset, split=split, streaming=streaming)
        rows = data if isinstance(data, datasets.IterableDataset) else data.to_iterable_dataset()
        if rows.features is not None:
            rows = rows.cast(_undecoded(rows.features))
        iterator = iter(rows)
        while True:
            try:
                row = next(iterator)
            except StopIteration:
                return
            yield dict(row)
    except BadInput:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise BadInput(
            Fault(name, f"split {split} cannot be read: {reason}", "check name, split and network")
        ) from None


def _undecoded(feature: Any) -> Any:
    """The same features with media left as bytes. `decode(False)` would leave JSON columns
    undecoded as well.
    """
    import datasets

    if isinstance(feature, dict):
        return type(feature)({key: _undecoded(value) for key, value in feature.items()})
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_undecoded(feature.feature))
    return (
        replace(feature, decode=False)
        if isinstance(feature, datasets.Image | datasets.Video)
        else feature
    )
