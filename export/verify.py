"""Verifies an exported directory from its files alone, against its config, vLLM's rules and the
source.

    python -m export.verify DIR [--source BF16_DIR] [--json]

All faults are shown in one table. Exit status: 0 without faults, 1 with faults, 2 when DIR is no
checkpoint at all. Weights that distillation trained (hybridquant.json names them) are not held to
the source; it says how many. How near the others must be follows from the calibration algorithm it
records: see export/closeness.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from checkpoint.config import CheckpointConfig, read_config, read_json
from checkpoint.faults import BadInput, Fault, main
from checkpoint.files import TensorFiles, all_finite, in_threads, layout_faults
from checkpoint.layout import expected_tensors, language_model_linears
from export.closeness import elements_beyond, tensor_faults
from export.layout import kv_scale_name, linear_formats, quantization_section, quantized_layout
from export.load import packed_tensors
from export.manifest import read_manifest
from export.matching import FUSED, is_excluded, vllm_name
from quantize.algorithms import ALGORITHMS, Change
from quantize.formats.registry import FORMATS

_ALGORITHMS = (*(format.algo for format in FORMATS.values()), "MIXED_PRECISION")
_REWRITE = "export again"
_PART = {"cpu": 1 << 18, "cuda": 1 << 23}
"""Weights compared at once: what fits into a CPU's cache, and what keeps a GPU busy; at 1 << 26,
NVFP4 of the 12B took 18 GB of it."""


def verify(directory: Path, source: Path | None = None) -> list[Fault]:
    """Verify an exported directory.

    Args:
        directory: The exported directory.
        source: The BF16 checkpoint it was made from; adds the comparison of weights.

    Returns:
        Every fault found; an empty list for a sound directory.

    Raises:
        BadInput: When either directory is no checkpoint of this architecture.
    """
    config = read_config(directory)
    source_config = read_config(source) if source else None
    original = TensorFiles(source) if source else None
    try:
        tensors = TensorFiles(directory)
    except BadInput as bad:
        return list(bad.faults)
    section = quantization_section(config)
    faults = list(_section_faults(config, section))
    if source_config and expected_tensors(source_config) != expected_tensors(config):
        faults.append(
            Fault(
                str(source), "describes a model of other dimensions", "is this the right --source?"
            )
        )
        original = None
    formats = linear_formats(config, tensors.specs)
    kv_scales = isinstance(section.get("kv_cache_scheme"), dict)
    shapes = layout_faults(
        tensors.specs, quantized_layout(config, formats, kv_scales), str(directory)
    )
    faults += shapes
    faults += _exclusion_faults(config, section, formats)
    if not shapes:  # with tensors missing or mis-shaped there is nothing to compare
        trained, change = trained_linears(directory), weight_change(directory)
        faults += _value_faults(config, tensors, formats, kv_scales, original, trained, change)
    return faults


def trained_linears(directory: Path) -> frozenset[str]:
    """Linears whose weights distillation has moved away from the source, by the directory's own
    manifest.
    """
    try:
        manifest = read_manifest(directory)
    except BadInput:
        return frozenset()
    named = (
        manifest.distillation.get("trained")
        if manifest and isinstance(manifest.distillation, dict)
        else None
    )
    return (
        frozenset(name for name in named if isinstance(name, str))
        if isinstance(named, list)
        else frozenset()
    )


def weight_change(directory: Path) -> Change:
    """What the calibration algorithm may have done to weights, by the manifest; only rounding where
    it names none.
    """
    try:
        manifest = read_manifest(directory)
    except BadInput:
        return "rounded"
    section = (
        manifest.recipe.get("quantize") if manifest and isinstance(manifest.recipe, dict) else None
    )
    name = section.get("algorithm") if isinstance(section, dict) else None
    return ALGORITHMS[name].change if isinstance(name, str) and name in ALGORITHMS else "rounded"


def _section_faults(config: CheckpointConfig, section: Mapping[str, Any]) -> Iterator[Fault]:
    where = str(config.directory / "config.json")
    if not section:
        yield Fault(where, "has no quantization_config, so vLLM serves BF16", _REWRITE)
        return
    if section.get("quant_method") != "modelopt":
        yield Fault(
            where, f"quant_method is {section.get('quant_method')!r}, not 'modelopt'", _REWRITE
        )
    if section.get("quant_algo") not in _ALGORITHMS:
        yield Fault(
            where,
            f"quant_algo is {section.get('quant_algo')!r}, not one of {', '.join(_ALGORITHMS)}",
            _REWRITE,
        )
    for entry in _entries(section):
        if not isinstance(entry, str) or not entry or not entry.isprintable():
            # ModelOpt 0.47's exporter appends "\0backbone.pt_name_sentinel" to every entry of this
            # model.
            yield Fault(
                where, f"ignore entry {entry!r} is no module name", "export.repair, or export again"
            )
    legacy_path = config.directory / "hf_quant_config.json"
    try:
        legacy = read_json(legacy_path).get("quantization") or {}
    except BadInput as bad:
        yield from bad.faults
        return
    for key, other in (("quant_algo", "quant_algo"), ("exclude_modules", "ignore")):
        if legacy.get(key) != section.get(other, [] if other == "ignore" else None):
            yield Fault(str(legacy_path), f"{key} differs from {other} in config.json", _REWRITE)
    if section.get("quant_algo") == "NVFP4" and legacy.get("group_size") != 16:
        yield Fault(str(legacy_path), f"group_size is {legacy.get('group_size')}, not 16", _REWRITE)


def _entries(section: Mapping[str, Any]) -> list[Any]:
    entries = section.get("ignore")
    return entries if isinstance(entries, list) else []


def _exclusion_faults(
    config: CheckpointConfig, section: Mapping[str, Any], formats: Mapping[str, str]
) -> Iterator[Fault]:
    """Hold vLLM's reading of the exclude list against the tensors: whoever has scales, and only he,
    is quantized.
    """
    if not section:
        return
    where = str(config.directory / "config.json")
    entries = [entry for entry in _entries(section) if isinstance(entry, str)]
    layers = (
        section.get("quantized_layers") if section.get("quant_algo") == "MIXED_PRECISION" else None
    )
    linears = language_model_linears(config)
    for linear in linears:
        parent, _, short = vllm_name(linear.name).rpartition(".")
        module = f"{parent}.qkv_proj" if short in FUSED["qkv_proj"] else f"{parent}.{short}"
        format = FORMATS[formats[linear.name]] if linear.name in formats else None
        excluded = is_excluded(module, entries)
        if excluded and format:
            yield Fault(
                linear.name,
                "is quantized, but vLLM's exclude rule leaves it out",
                "mend `ignore`: " + _REWRITE,
            )
        if isinstance(layers, dict):  # vLLM asks this table about what the exclude list leaves in
            given = layers.get(linear.name, {}).get("quant_algo")
            if given != (format.algo if format else None):
                yield Fault(
                    where,
                    f"quantized_layers gives {linear.name} {given}, its tensors say otherwise",
                    _REWRITE,
                )
            continue
        if not excluded and not format:
            yield Fault(
                linear.name,
                "has no scales, but vLLM takes it for quantized",
                "mend `ignore`: " + _REWRITE,
            )
        if format and format.algo != section.get("quant_algo"):
            yield Fault(
                linear.name,
                f"is {format.algo}, config.json says {section.get('quant_algo')}",
                _REWRITE,
            )
    for layer, formats_used in _by_layer(linears, formats).items():
        if len(formats_used) > 1:
            yield Fault(
                f"layer {layer}",
                "q_proj, k_proj and v_proj differ in format; vLLM fuses them",
                _REWRITE,
            )
    others = ["language_model.lm_head"]
    others += [
        f"{vllm_name(n.name).rpartition('.')[0]}.conv1d" for n in linears if n.short == "in_proj"
    ]
    for module in others:
        if layers is None and not is_excluded(module, entries):
            yield Fault(
                module,
                "has no scales, but vLLM takes it for quantized",
                "mend `ignore`: " + _REWRITE,
            )


def _by_layer(linears: list[Any], formats: Mapping[str, str]) -> dict[int, set[str | None]]:
    used: dict[int, set[str | None]] = {}
    for linear in linears:
        if linear.short in FUSED["qkv_proj"]:
            used.setdefault(linear.layer, set()).add(formats.get(linear.name))
    return used


def _value_faults(
    config: CheckpointConfig,
    tensors: TensorFiles,
    formats: Mapping[str, str],
    kv_scales: bool,
    original: TensorFiles | None,
    trained: frozenset[str],
    change: Change,
) -> Iterator[Fault]:
    shared: dict[str, dict[str, float]] = {}
    linears = {linear.name: linear for linear in language_model_linears(config)}
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def check(name: str) -> tuple[list[Fault], dict[str, float]]:
        linear = linears.get(name.removesuffix(".weight"))
        if linear is None or linear.name not in formats:
            return list(_plain_faults(name, tensors, original)), {}
        packed = packed_tensors(tensors, linear.name, formats[linear.name])
        source = None if linear.name in trained else original
        fused = linear.short in FUSED["qkv_proj"]
        scales: dict[str, float] = {
            s: float(packed[s]) for s in ("input_scale", "weight_scale_2") if fused and s in packed
        }
        packed = {suffix: tensor.to(device) for suffix, tensor in packed.items()}
        return list(
            _packed_faults(linear.name, formats[linear.name], packed, source, change)
        ), scales

    names = tqdm(
        expected_tensors(config), desc="verifying", unit="tensor", leave=False, disable=None
    )
    for name, (faults, scales) in zip(
        expected_tensors(config), in_threads(check, names), strict=True
    ):
        yield from faults
        for suffix, scale in scales.items():
            mixer, _, short = name.removesuffix(".weight").rpartition(".")
            shared.setdefault(f"{mixer} {suffix}", {})[short] = scale
    for key, values in shared.items():
        if len(set(values.values())) > 1:
            yield Fault(key, f"differs between {values}; vLLM fuses q, k and v under one", _REWRITE)
    if kv_scales:
        for linear in linears.values():
            if linear.short in ("k_proj", "v_proj"):
                yield from _scale_faults(kv_scale_name(linear), tensors.read(kv_scale_name(linear)))


def _plain_faults(name: str, tensors: TensorFiles, original: TensorFiles | None) -> Iterator[Fault]:
    tensor = tensors.read(name)
    if tensor.is_floating_point() and not all_finite(tensor):
        yield Fault(name, "holds NaN or infinite values", _REWRITE)
    if original is not None:
        if name not in original or original.specs[name] != tensors.specs[name]:
            yield Fault(
                name,
                "is not in the source, or has another shape there",
                "is this the right --source?",
            )
        elif not torch.equal(_bits(tensor), _bits(original.read(name))):
            yield Fault(name, "differs from the source, though it is not quantized", _REWRITE)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _scale_faults(name: str, scale: torch.Tensor) -> Iterator[Fault]:
    values = scale.float()
    if not bool((torch.isfinite(values) & (values > 0)).all()):
        bad = int((~(torch.isfinite(values) & (values > 0))).sum())
        yield Fault(
            name,
            f"has {bad} values that are zero, negative or not finite",
            "calibrate and export again",
        )


def _packed_faults(
    linear: str,
    format: str,
    packed: Mapping[str, torch.Tensor],
    original: TensorFiles | None,
    change: Change,
) -> Iterator[Fault]:
    scales = [
        fault
        for suffix, t in packed.items()
        if suffix != "weight"
        for fault in _scale_faults(f"{linear}.{suffix}", t)
    ]
    yield from scales
    if scales:
        return
    whole = f"{linear}.weight"
    weight = None
    if original is not None:
        spec, columns = (
            original.specs.get(whole),
            FORMATS[format].unpack(_rows(packed, 0, 1)).shape[1],
        )
        if spec is None:
            yield Fault(whole, "is not in the source", "is this the right --source?")
            return
        if spec.shape != (len(packed["weight"]), columns):
            yield Fault(whole, "has another shape in the source", "is this the right --source?")
            return
        weight = original.read(whole).to(packed["weight"].device)
    rows, beyond, unsound, kept = len(packed["weight"]), 0, False, list[torch.Tensor]()
    step = max(1, _PART[packed["weight"].device.type] // packed["weight"].shape[1])
    for start in range(
        0, rows, step
    ):  # a part that fits into the cache, and never the whole in float32
        part = _rows(packed, start, start + step)
        unpacked = FORMATS[format].unpack(part)
        unsound = unsound or not all_finite(unpacked)
        if weight is not None:
            exact = weight[start : start + step].float()
            beyond += elements_beyond(exact, unpacked, part, format, change)
            kept += [unpacked] if change != "rounded" else []
    if unsound:
        yield Fault(whole, "holds NaN or infinite values", _REWRITE)
    elif weight is not None and beyond:
        what = f"{beyond / weight.numel():.2%} of the weights are further from the source than {format} rounding allows"
        yield Fault(whole, what, "is this the right --source? else " + _REWRITE)
    elif weight is not None and kept:
        yield from tensor_faults(whole, weight.float(), torch.cat(kept), format, change)


def _rows(packed: Mapping[str, torch.Tensor], start: int, end: int) -> dict[str, torch.Tensor]:
    """Some rows of a packed linear: scalars speak of all of them."""
    return {
        suffix: tensor[start:end] if tensor.dim() == 2 else tensor
        for suffix, tensor in packed.items()
    }


def show_faults(directory: Path, faults: list[Fault]) -> None:
    """Print all faults in one table, or that there are none."""
    console = Console(stderr=bool(faults))
    if trained := trained_linears(directory):
        note = "linears were trained: how far their weights are from the source's is not checked"
        console.print(f"{directory}: {len(trained)} {note}", highlight=False, soft_wrap=True)
    if weight_change(directory) == "moved":
        note = "the algorithm moved the weights: tensors, rows and columns are held to the source's, single weights not"
        console.print(f"{directory}: {note}", highlight=False, soft_wrap=True)
    if not faults:
        console.print(f"{directory}: verified, no faults", highlight=False)
        return
    table = Table(title=f"{directory}: {len(faults)} faults", title_justify="left")
    for column in ("where", "what", "remedy"):
        table.add_column(column, overflow="fold")
    for fault in faults[:200]:
        table.add_row(fault.where, fault.what, fault.remedy)
    console.print(table, markup=False)
    if len(faults) > 200:
        console.print(f"… and {len(faults) - 200} more")


def _run() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m export.verify", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--source",
        type=Path,
        metavar="BF16_DIR",
        help="compare with the checkpoint it was made from",
    )
    parser.add_argument("--json", action="store_true", help="print the faults as JSON")
    arguments = parser.parse_args()
    faults = verify(arguments.directory, arguments.source)
    if arguments.json:
        json.dump(
            {"directory": str(arguments.directory), "faults": [asdict(f) for f in faults]},
            sys.stdout,
            indent=2,
        )
        print()
    else:
        show_faults(arguments.directory, faults)
    return 1 if faults else 0


if __name__ == "__main__":
    main(_run)
