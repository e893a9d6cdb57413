"""Files beside the weights: config.json, the model's companions from the source, the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint.atomic import replaced_file, write_json
from checkpoint.config import read_json
from checkpoint.content import MANIFEST
from checkpoint.faults import BadInput, Fault, raise_if_any
from checkpoint.opened import Checkpoint
from checkpoint.reading import read_small_file

_SECTION = "quantization_config"
_OLD_RATE = "video_pruning_rate"
"""Key of `serve` in manifests of version 0.1."""

_TRANSIENT = "README"
"""Readmes may differ: an export has its own card."""


def repaired_config(
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
    repaired = dict(raw)
    changes = []
    for key, value in source.config.raw.items():
        if key not in raw or raw[key] != value:
            repaired[key] = value
            changes.append(f"config.json: {key} is the source's again")
    for key in raw:
        if key not in source.config.raw and key != _SECTION:
            del repaired[key]
            changes.append(f"config.json: {key} removed, which the source does not have")
    return repaired, changes


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


def repair_manifest(target: Path) -> Iterator[str]:
    """Bring a manifest of version 0.1 into today's form; yield a line for what was changed.

    There, `serve` held the EVS rate, which now has its own section.
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


def update_hashes(
    target: Path, changed: set[str], removed: set[str], proven: set[str]
) -> Iterator[str]:
    """Let the manifest record the hashes of repaired files; yield a line if any is new.

    A file that has its recorded hash again needs none. A hash is replaced only for a file whose
    whole content is proven otherwise: it would vouch for damage that the repair did not look for.

    Args:
        target: The repaired directory.
        changed: Names of files that were written, or whose content was checked.
        removed: Names of files that are gone.
        proven: Names of those whose whole content follows from the source or the tensors.

    Raises:
        BadInput: A file has not its recorded hash, and nothing proves it.
    """
    path = target / MANIFEST
    manifest = read_json(path) if path.exists() else {}
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        return
    gone = [name for name in sorted(removed) if files.pop(name, None) is not None]
    new = []
    faults = []
    for name in sorted(changed - {MANIFEST}):
        if not (target / name).is_file() or name.upper().startswith(_TRANSIENT):
            continue
        with (target / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if files.get(name) == digest:
            continue
        files[name] = digest
        new.append(name)
        if name not in proven:
            what = f"is repaired, but its SHA-256 is still not the one in {MANIFEST}"
            faults.append(Fault(str(target / name), what, "give --source BF16_DIR"))
    raise_if_any(faults)
    if new or gone:
        write_json(path, manifest)
        yield f"{MANIFEST}: {len(new)} new hashes, {len(gone)} removed"
