"""Files beside the weights: config.json, the model's companions from the source, the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint.atomic import replaced_file, write_json
from checkpoint.config import read_json
from checkpoint.faults import BadInput
from checkpoint.opened import Checkpoint
from checkpoint.reading import read_small_file
from export.manifest import MANIFEST

_SECTION = "quantization_config"
_OLD_RATE = "video_pruning_rate"
"""Key of `serve` in manifests of version 0.1."""

_TRANSIENT = "README"
"""Readmes may differ: an export has a card of its own."""


def mended_config(
    raw: Mapping[str, Any] | None, source: Checkpoint | None
) -> tuple[dict[str, Any], list[str]]:
    """Return config.json with the source's keys, and what was changed.

    Args:
        raw: The directory's; None if it is not one of a known family.
        source: The BF16 checkpoint, if given; needed where `raw` is None.
    """
    if source is None:
        assert raw is not None
        return dict(raw), []
    if raw is None:
        return dict(source.config.raw), ["config.json: taken from the source"]
    mended = dict(raw)
    changes = []
    for key, value in source.config.raw.items():
        if key not in raw or raw[key] != value:
            mended[key] = value
            changes.append(f"config.json: {key} is the source's again")
    for key in raw:
        if key not in source.config.raw and key != _SECTION:
            del mended[key]
            changes.append(f"config.json: {key} removed, which the source does not have")
    return mended, changes


def restore_companions(source: Checkpoint, target: Path) -> Iterator[str]:
    """Copy the source's files that are missing or differ; yield a line for each."""
    for name in source.companions.digests:
        if name.upper().startswith(_TRANSIENT):
            continue
        data = read_small_file(source.directory / name, source.directory)
        path = target / name
        state = "was missing"
        if path.exists() or path.is_symlink():
            try:
                if read_small_file(path, target) == data:
                    continue
                state = "differed"
            except BadInput:
                state = "could not be read"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as partial:
            partial.write_bytes(data)
        yield f"{name}: taken from the source (it {state})"


def mend_manifest(target: Path) -> Iterator[str]:
    """Bring a manifest of version 0.1 into today's form; yield a line for what was changed.

    There, `serve` held the EVS rate, which is now in a section of its own.
    """
    path = target / MANIFEST
    if not path.exists():
        return
    manifest = read_json(path)
    serve = manifest.get("serve")
    if not isinstance(serve, dict) or _OLD_RATE not in serve:
        return
    rate = serve.pop(_OLD_RATE)
    video = manifest.get("video")
    manifest["video"] = {"pruning_rate": rate, **(video if isinstance(video, dict) else {})}
    write_json(path, manifest)
    yield f"{MANIFEST}: serve.{_OLD_RATE} is now video.pruning_rate, {rate}"


def update_hashes(target: Path, changed: set[str], removed: set[str]) -> Iterator[str]:
    """Let the manifest record the hashes of changed files; yield a line if it records any.

    Args:
        target: The mended directory.
        changed: Names of files that were written.
        removed: Names of files that are gone.
    """
    path = target / MANIFEST
    if not path.exists() or not changed | removed:
        return
    manifest = read_json(path)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        return
    for name in removed:
        files.pop(name, None)
    are_objects = any(isinstance(value, dict) for value in files.values())
    for name in sorted(changed - {MANIFEST}):
        with (target / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if are_objects:
            files[name] = {"sha256": digest, "bytes": (target / name).stat().st_size}
        else:
            files[name] = digest
    write_json(path, manifest)
    yield f"{MANIFEST}: hashes of {len(changed - {MANIFEST})} changed files"
