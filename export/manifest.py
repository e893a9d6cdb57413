"""hybridquant.json beside the weights: what made them, from what, how the gate went, and how to
serve them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from checkpoint.atomic import write_json
from checkpoint.config import read_json
from checkpoint.content import MANIFEST
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.run_state import file_digest
from checkpoint.video import Video

_SHA256 = re.compile("[0-9a-f]{64}")
NOT_MEASURED: dict[str, Any] = {"passed": None}


@dataclass(frozen=True)
class Manifest:
    """A record of one run.

    The same inputs give the same manifest, except `times`.

    Attributes:
        recipe: The resolved recipe.
        versions: Package versions.
        formats: Number of linear layers by format.
        calibration: Samples, tokens, skipped samples; `algorithm`; `digests`, a hash of each prompt
            in its order; `files`, SHA-256 of the files that samples came from.
        video: How clips were sampled and pruned.
        serve: Settings for `python -m serve`.
        gate: `passed` (None until measured), the measured figures, and what was missed.
        distillation: `trained`, the tensors that are no longer the source's, and the
            course of the training; empty for PTQ.
        source: `revision`, the Hub's if the source is a snapshot of its cache, and `files`, the
            SHA-256 of every file that was read.
        files: SHA-256 of every file of the directory but this one; empty until it is verified.
        times: `finished`, and seconds by step.
    """

    recipe: dict[str, Any]
    versions: dict[str, str]
    formats: dict[str, int]
    calibration: dict[str, Any]
    video: Video = field(default_factory=Video)
    serve: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=lambda: dict(NOT_MEASURED))
    distillation: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    times: dict[str, Any] = field(default_factory=dict)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest into `directory`, replacing it as a whole."""
    values = {name: getattr(manifest, name) for name in _fields()}
    values["video"] = manifest.video.model_dump()
    write_json(directory / MANIFEST, values)


def read_manifest(directory: Path) -> Manifest | None:
    """Read the manifest of `directory`; None if there is none.

    Raises:
        BadInput: It is not JSON, or a field has another type.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    raw = read_json(path)
    faults = []
    values: dict[str, Any] = {}
    for name in _fields():
        value = raw.get(name, {})
        if isinstance(value, dict):
            values[name] = value
        else:
            what = f"{name} is a {type(value).__name__}, not an object"
            faults.append(Fault(str(path), what, "export again"))
    if faults:
        raise BadInput(*faults)
    try:
        values["video"] = Video.model_validate(values["video"])
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in ("video", *first["loc"]))
        what = f"{name} is {shortened(first['input'], 80)}: {shortened(first['msg'])}"
        raise BadInput(Fault(str(path), what, "export again")) from None
    return Manifest(**values)


def content_faults(directory: Path) -> Iterator[Fault]:
    """Yield what is wrong with the manifest itself; nothing if there is none."""
    path = directory / MANIFEST
    try:
        manifest = read_manifest(directory)
    except BadInput as bad:
        yield from bad.faults
        return
    if manifest is None:
        return
    for name, digest in manifest.files.items():
        is_inside = not name.startswith("/") and ".." not in name.split("/")
        if not is_inside or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            what = f"files.{shortened(name, 80)} is not the SHA-256 of a file of the directory"
            yield Fault(str(path), what, "export again")
            return


def file_digests(directory: Path, weights: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 of every file of an exported directory but the manifest, by name.

    Args:
        directory: The exported directory.
        weights: Those of the weight files, which are not read again.
    """
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_file() and name != MANIFEST:
            found[name] = weights.get(name) or file_digest(path)
    return found


def recorded_section(directory: Path, field: str) -> dict[str, Any]:
    """Return a section of the manifest, such as `recipe`; empty if there is no sound manifest."""
    try:
        manifest = read_manifest(directory)
    except BadInput:
        return {}
    section: dict[str, Any] = getattr(manifest, field, {})
    return section


def _fields() -> list[str]:
    return [item.name for item in dataclasses.fields(Manifest)]
