"""The repair of a directory: planned, made in a copy, verified, put into its place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from checkpoint.atomic import write_json
from checkpoint.config import CheckpointConfig, read_config, read_json
from checkpoint.faults import BadInput, Fault
from checkpoint.files import TensorFiles
from checkpoint.opened import Checkpoint, open_bf16
from export.layout import linear_formats, quantization_section
from export.repair.beside import (
    repair_manifest,
    repaired_config,
    restore_companions,
    update_hashes,
)
from export.repair.section import CONFIG, LEGACY, repair_sections
from export.repair.staging import exchange, staged_copy
from export.repair.weights import plan_weights, write_weights
from export.verify import verify


class CannotRepair(Exception):
    """Raised when a directory stays faulty whatever is tried; it is unchanged then."""

    def __init__(self, *faults: Fault) -> None:
        self.faults = faults
        super().__init__("\n".join(str(fault) for fault in faults))


def repair(directory: Path, source: Path | None) -> list[str]:
    """Repair an exported directory.

    Args:
        directory: Its absolute path.
        source: The BF16 checkpoint that it was made from, if there is one.

    Returns:
        What was changed, a line each; empty for a sound directory.

    Raises:
        CannotRepair: With the faults that would stay. Nothing is changed then.
        BadInput: The source is not a BF16 checkpoint.
    """
    original = None if source is None else open_bf16(source)
    with staged_copy(directory) as copy:
        try:
            changes = _repair(directory, copy, original)
            faults = verify(copy, source)
        except BadInput as bad:
            faults = list(bad.faults)
        if faults:
            raise CannotRepair(*[_named(fault, copy, directory) for fault in faults])
        if changes:
            exchange(copy, directory)
    return changes


def _repair(directory: Path, copy: Path, source: Checkpoint | None) -> list[str]:
    """Repair a copy of a directory; the directory itself is only read."""
    own = _own_config(directory, source)
    raw, changes = repaired_config(None if own is None else own.raw, source)
    section = _section(directory)
    raw["quantization_config"] = section
    config = CheckpointConfig(copy, raw)
    tensors = TensorFiles(directory)
    declared = _declared(own)
    weights = plan_weights(config, tensors, declared, source)
    changes += weights.changes()
    write_weights(weights, config, tensors, source, copy)
    legacy = _readable(directory / LEGACY)
    sections = repair_sections(config, weights.formats, weights.kv_scales, section, legacy)
    changes += sections.changes
    raw["quantization_config"] = sections.section
    if own is None or raw != own.raw:
        write_json(copy / CONFIG, raw)
    if sections.legacy != legacy:
        write_json(copy / LEGACY, sections.legacy)
    if source is not None:
        changes += restore_companions(source, copy)
    changes += repair_manifest(copy)
    changed, removed = _differences(directory, copy)
    checked = changed | {CONFIG, LEGACY}
    # With the source, the verifier compares every tensor and file of the copy with it.
    proven = {LEGACY} if source is None else checked
    changes += update_hashes(copy, checked, removed, proven)
    return changes


def _own_config(directory: Path, source: Checkpoint | None) -> CheckpointConfig | None:
    """The directory's configuration; None where only the source can replace it.

    Raises:
        BadInput: It is not one of a known family, and there is no source.
    """
    try:
        return read_config(directory)
    except BadInput as bad:
        if source is None:
            hint = Fault(str(directory / CONFIG), "cannot be used", "give --source BF16_DIR")
            raise BadInput(*bad.faults, hint) from None
        return None


def _section(directory: Path) -> dict[str, Any]:
    """`quantization_config` of config.json, whatever model that names; empty if it has none."""
    section = _readable(directory / CONFIG).get("quantization_config")
    return dict(section) if isinstance(section, dict) else {}


def _declared(own: CheckpointConfig | None) -> dict[str, str]:
    """Format of linears by the directory's own section; empty if that cannot be read."""
    if own is None or not quantization_section(own):
        return {}
    try:
        return linear_formats(own)
    except BadInput:
        return {}


def _readable(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if it is missing or broken."""
    try:
        return read_json(path)
    except BadInput:
        return {}


def _differences(directory: Path, copy: Path) -> tuple[set[str], set[str]]:
    """Names of the files that a copy adds or changes, and of those that it lacks."""
    before = _files(directory)
    after = _files(copy)
    changed = set()
    for name in after:
        is_same = name in before and os.path.samefile(directory / name, copy / name)
        if not is_same and _bytes_differ(directory / name, copy / name):
            changed.add(name)
    return changed, before - after


def _bytes_differ(before: Path, after: Path) -> bool:
    """Whether a file was rewritten; where there are no hard links, all files are copies."""
    if not before.exists() or before.stat().st_size != after.stat().st_size:
        return True
    return before.stat().st_mtime_ns != after.stat().st_mtime_ns


def _files(directory: Path) -> set[str]:
    found = set()
    for path in directory.rglob("*"):
        if path.is_file():
            found.add(path.relative_to(directory).as_posix())
    return found


def _named(fault: Fault, copy: Path, directory: Path) -> Fault:
    """A fault of the copy, as one of the directory."""
    where = fault.where.replace(str(copy), str(directory))
    return Fault(where, fault.what.replace(str(copy), str(directory)), fault.remedy)
