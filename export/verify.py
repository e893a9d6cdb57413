"""Verifies an exported directory from its files alone, against its config, vLLM's rules and the
source.

    python -m export.verify DIR [--source BF16_DIR] [--json]

All faults are shown in one table. Exit status: 0 without faults, 1 with faults, 2 when DIR is not a
checkpoint. Weights that a distillation has trained (hybridquant.json names them) are not compared
with the source; their number is printed. How near the others must be follows from the calibration
algorithm that hybridquant.json records: see export/closeness.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoint.command import command_parser, parse_command
from checkpoint.config import read_config
from checkpoint.faults import BadInput, Fault, main
from checkpoint.files import TensorFiles, layout_faults
from checkpoint.layout import Specs
from checkpoint.libraries import prepare_libraries
from checkpoint.opened import Checkpoint, open_checkpoint
from export.layout import (
    format_faults,
    has_kv_scales,
    linear_formats,
    quantization_section,
    quantized_layout,
)
from export.manifest import Manifest, read_manifest
from export.section import section_faults
from export.weights import ValueCheck, fused_scale_faults, kv_scale_faults
from quantize.algorithms import ALGORITHMS, Change

_SHOWN = 200
"""Faults in the table; the rest is counted."""


def verify(directory: Path, source: Path | None = None) -> list[Fault]:
    """Verify an exported directory.

    Args:
        directory: The exported directory.
        source: The BF16 checkpoint that it was made from; adds the comparison of weights.

    Returns:
        Every fault found; an empty list for a sound directory.

    Raises:
        BadInput: One of the directories is not a checkpoint of a known architecture.
    """
    config = read_config(directory)
    original = None
    if source is not None:
        original = open_checkpoint(source)
    try:
        tensors = TensorFiles(directory)
    except BadInput as bad:
        return list(bad.faults)
    exported = Checkpoint(config, tensors)
    faults = list(section_faults(config))
    if original is not None and original.layout != exported.layout:
        what = "describes a model of other dimensions"
        faults.append(Fault(str(source), what, "is this the right --source?"))
        original = None
    try:
        formats = linear_formats(config)
    except BadInput:  # section_faults has reported the same
        return faults
    if not quantization_section(config):
        return faults
    wrong_layout = list(_layout_faults(exported, formats))
    faults += wrong_layout
    if not wrong_layout:  # with tensors missing or mis-shaped there is nothing to compare
        faults += _value_faults(exported, formats, original)
    return faults


def _layout_faults(exported: Checkpoint, formats: Mapping[str, str]) -> Iterator[Fault]:
    """Yield one fault for each linear of another format, and one for each other wrong tensor."""
    found = exported.tensors.specs
    kv_scales = has_kv_scales(quantization_section(exported.config))
    expected: Specs = quantized_layout(exported.config, formats, kv_scales)
    others = set()
    for linear, fault in format_faults(exported.config, formats, found):
        yield fault
        others.add(linear)
    found = {name: spec for name, spec in found.items() if _owner(name) not in others}
    expected = {name: spec for name, spec in expected.items() if _owner(name) not in others}
    optional = exported.config.family.optional_tensors
    yield from layout_faults(found, expected, str(exported.directory), optional)


def _owner(tensor: str) -> str:
    """The module that a tensor belongs to."""
    return tensor.rpartition(".")[0]


def _value_faults(
    exported: Checkpoint, formats: Mapping[str, str], original: Checkpoint | None
) -> Iterator[Fault]:
    source = None if original is None else original.tensors
    trained = trained_linears(exported.directory)
    change = weight_change(exported.directory)
    yield from ValueCheck(exported, formats, source, trained, change).faults()
    yield from fused_scale_faults(exported, formats)
    if has_kv_scales(quantization_section(exported.config)):
        yield from kv_scale_faults(exported)


def trained_linears(directory: Path) -> frozenset[str]:
    """Return the linears whose weights a distillation has moved away from the source, by the
    directory's own manifest.
    """
    named = _recorded(directory, "distillation").get("trained")
    if not isinstance(named, list):
        return frozenset()
    return frozenset(name for name in named if isinstance(name, str))


def weight_change(directory: Path) -> Change:
    """Return what the calibration algorithm may have done to weights, by the manifest.

    Only rounding is allowed where the manifest names no algorithm.
    """
    section = _recorded(directory, "recipe").get("quantize")
    name = section.get("algorithm") if isinstance(section, dict) else None
    if not isinstance(name, str) or name not in ALGORITHMS:
        return "rounded"
    return ALGORITHMS[name].change


def _recorded(directory: Path, field: str) -> dict[str, Any]:
    """A section of the manifest; empty where there is none or it is not a mapping."""
    try:
        manifest: Manifest | None = read_manifest(directory)
    except BadInput:
        return {}
    section = getattr(manifest, field, None)
    return section if isinstance(section, dict) else {}


def show_faults(directory: Path, faults: list[Fault]) -> None:
    """Print all faults in one table, or that there are none."""
    console = Console(stderr=bool(faults))
    trained = trained_linears(directory)
    if trained:
        note = "linears were trained: how far their weights are from the source's is not checked"
        console.print(f"{directory}: {len(trained)} {note}", highlight=False, soft_wrap=True)
    if weight_change(directory) == "moved":
        note = "the algorithm moved the weights: tensors, rows and columns are compared with the "
        note += "source's, single weights are not"
        console.print(f"{directory}: {note}", highlight=False, soft_wrap=True)
    if not faults:
        console.print(f"{directory}: verified, no faults", highlight=False)
        return
    table = Table(title=f"{directory}: {len(faults)} faults", title_justify="left")
    for column in ("where", "what", "remedy"):
        table.add_column(column, overflow="fold")
    for fault in faults[:_SHOWN]:
        table.add_row(fault.where, fault.what, fault.remedy)
    console.print(table, markup=False)
    if len(faults) > _SHOWN:
        console.print(f"… and {len(faults) - _SHOWN} more")


def _run() -> int:
    parser = command_parser("export.verify", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--source",
        type=Path,
        metavar="BF16_DIR",
        help="compare with the checkpoint that it was made from",
    )
    parser.add_argument("--json", action="store_true", help="print the faults as JSON")
    arguments = parse_command(parser)
    prepare_libraries()
    faults = verify(arguments.directory, arguments.source)
    if arguments.json:
        found = [dataclasses.asdict(fault) for fault in faults]
        print(json.dumps({"directory": str(arguments.directory), "faults": found}, indent=2))
    else:
        show_faults(arguments.directory, faults)
    return 1 if faults else 0


if __name__ == "__main__":
    main(_run)
