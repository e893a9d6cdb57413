"""Checks the files beside the weights of an exported directory.

- What vLLM or transformers could load, and no export contains, is a fault: other weights, pickles,
  Python that no auto_map names. Documents, pictures and hidden files may be added at any time.
- With the source, every file that it has must be the same, and config.json except for
  `quantization_config`. README may differ: an upload writes it.
- With the manifest, every file must have the SHA-256 that it records.
- What neither vouches for must at least be sound: see `export.unproven`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from checkpoint.companions import (
    is_for_people,
    is_known,
    is_readme,
    needed_python,
)
from checkpoint.config import CheckpointConfig
from checkpoint.content import MANIFEST
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.json_differences import MISSING, json_differences
from checkpoint.opened import Checkpoint
from checkpoint.other_weights import INDEX, OTHER_WEIGHTS
from checkpoint.reading import checkpoint_file_fault
from checkpoint.run_state import file_digest
from quantize.sensitivity import SENSITIVITY

CONFIG = "config.json"
LEGACY = "hf_quant_config.json"
_OWN = (INDEX, CONFIG, LEGACY, MANIFEST, SENSITIVITY)
_MOST_FILES = 10_000
_REMOVE = "remove it"


def stray_faults(directory: Path, files: Mapping[str, str], is_complete: bool) -> Iterator[Fault]:
    """Yield one fault for each file that an export does not contain and a loader might read.

    Args:
        directory: The exported directory.
        files: What is known to belong there, by relative name: weights, the source's files, the
            manifest's.
        is_complete: Whether nothing else does, documents and pictures aside; else other files of a
            model are taken for its own.
    """
    python = [] if is_complete else needed_python(directory)
    for name in _walk(directory):
        path = directory / name
        short = path.name
        if name in files or name in _OWN or name in python or is_for_people(short):
            if not is_for_people(short):
                yield from pickle_faults(path, directory)
        elif short.endswith(".safetensors"):
            what = f"is not named in {INDEX}; vLLM loads it all the same, or in place of the others"
            yield Fault(str(path), what, _REMOVE)
        elif path.suffix in OTHER_WEIGHTS:
            yield Fault(str(path), "holds weights that nothing vouches for", _REMOVE)
        elif path.suffix in (".py", ".pyc", ".so"):
            yield Fault(str(path), "is code that is not the model's", _REMOVE)
        elif "/" not in name and is_known(name):
            pickled = list(pickle_faults(path, directory))
            yield from pickled
            if is_complete and not pickled:
                what = f"belongs neither to the source nor to what {MANIFEST} records"
                yield Fault(str(path), what, _REMOVE)
        else:
            yield Fault(str(path), "is not part of an export", _REMOVE)


def _walk(directory: Path) -> Iterator[str]:
    """Yield the relative names of all files; hidden ones are left out, as loaders leave them."""
    waiting = [directory]
    count = 0
    while waiting:
        folder = waiting.pop()
        for path in sorted(folder.iterdir()):
            count += 1
            if count > _MOST_FILES:
                what = f"contains more than {_MOST_FILES:,} files"
                raise BadInput(Fault(str(directory), what, "is this an exported directory?"))
            if path.name.startswith("."):
                continue
            if path.is_dir() and not path.is_symlink():
                waiting.append(path)
            else:
                yield str(path.relative_to(directory))


def pickle_faults(path: Path, directory: Path) -> Iterator[Fault]:
    """Yield a fault for a file that torch or Python would unpickle, whatever its name."""
    if checkpoint_file_fault(path, directory) is not None:
        return  # what reads it reports that
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file begins with the length of its JSON header, which may be any number.
    if start[8:] == b"{":
        return
    is_pickle = len(start) > 1 and start[0] == 0x80 and start[1] in range(2, 6)
    if is_pickle or start.startswith(b"PK\x03\x04"):
        yield Fault(str(path), "is a pickle, which can run any code", "copy the file again")


def source_faults(exported: CheckpointConfig, source: Checkpoint) -> Iterator[Fault]:
    """Yield one fault for each file, and each key of config.json, that is not the source's."""
    yield from source.companions.copy_faults(exported.directory)
    where = str(exported.directory / CONFIG)
    ours = dict(exported.raw)
    ours.pop("quantization_config", None)
    for key, found, expected in json_differences(ours, source.config.raw):
        if found is MISSING:
            what = f"{key} is missing, unlike in {source.directory}"
        elif expected is MISSING:
            what = f"{key} does not exist in {source.directory}"
        else:
            values = (
                f"{shortened(found, 60)}, in {source.directory} it is {shortened(expected, 60)}"
            )
            what = f"{key} is {values}"
        yield Fault(where, what, "copy config.json from the source, with this quantization_config")


def manifest_faults(
    directory: Path, recorded: Mapping[str, str], weights: Mapping[str, str]
) -> Iterator[Fault]:
    """Yield one fault for each file whose SHA-256 is not the one that the manifest records.

    Args:
        directory: The exported directory.
        recorded: SHA-256 by relative name, from the manifest.
        weights: SHA-256 of the weight files, as found.
    """
    for name, digest in recorded.items():
        path = directory / name
        if is_readme(path.name):
            continue
        if checkpoint_file_fault(path, directory) is not None:
            if not path.exists():
                yield Fault(str(path), f"no such file, but {MANIFEST} names it", "copy it again")
            continue  # what reads it reports anything else
        found = weights.get(name) or file_digest(path)
        if found != digest:
            what = f"has changed: its SHA-256 is not the one in {MANIFEST} ({digest[:12]}…)"
            yield Fault(str(path), what, "copy the file again, or export again")


def is_proven(path: Path, recorded: Mapping[str, str]) -> bool:
    """Whether a file has the SHA-256 that the manifest records."""
    return path.name in recorded and file_digest(path) == recorded[path.name]
