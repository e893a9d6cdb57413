"""The checks of an exported directory, in their order: files beside the weights, config files,
layout, values; and what could not be checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.companions import companion_faults
from checkpoint.config import CheckpointConfig, read_config
from checkpoint.content import MANIFEST
from checkpoint.faults import BadInput, Fault
from checkpoint.files import TensorFiles, layout_faults
from checkpoint.layout import Specs
from checkpoint.opened import Checkpoint, open_checkpoint
from export.beside import CONFIG, is_proven, manifest_faults, source_faults, stray_faults
from export.input_ranges import input_range_faults
from export.layout import (
    format_faults,
    has_kv_scales,
    linear_formats,
    quantization_section,
    quantized_layout,
)
from export.manifest import content_faults, recorded_section
from export.scales import fused_scale_faults, range_faults
from export.section import section_faults
from export.unproven import config_faults, tokenizer_faults
from export.weights import ValueCheck, Values
from quantize.algorithms import ALGORITHMS, Change

_CHAT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""Files that must belong together for prompts to be built and answers to end."""


@dataclass
class Verification:
    """What is known about an exported directory.

    Attributes:
        faults: What is wrong; empty for a sound directory.
        unchecked: What could not be checked, one clause each.
        digests: SHA-256 of every weight file, where the values were checked.
    """

    faults: list[Fault] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, faults: Iterable[Fault]) -> None:
        """Add faults. Of one file beside the weights, only the first is kept: the others follow
        from it.
        """
        known = self.broken_files
        for fault in faults:
            if fault.where not in known:
                self.faults.append(fault)

    @property
    def broken_files(self) -> set[str]:
        """Paths of the files that have a fault."""
        return {fault.where.partition(": ")[0] for fault in self.faults}


def inspect(directory: Path, source_path: Path | None, run_prompts: bool = True) -> Verification:
    """Check an exported directory; `export.verify.verify` describes arguments and exceptions.

    Args:
        directory: The exported directory.
        source_path: The BF16 checkpoint that it was made from.
        run_prompts: Whether input scales that the manifest does not vouch for are compared with
            what the source observes.
    """
    result = Verification()
    source = None if source_path is None else open_checkpoint(source_path)
    result.add(content_faults(directory))
    recorded = recorded_digests(directory)
    try:
        config = read_config(directory)
    except BadInput as bad:
        if not (directory / CONFIG).exists():
            raise
        result.add(bad.faults)
        result.add(manifest_faults(directory, recorded, {}))
        return result
    if source is not None:
        other = _other_dimensions(config, source)
        if other is not None:
            result.add([other])
            source = None
    tensors: TensorFiles | None = None
    try:
        tensors = TensorFiles(directory)
    except BadInput as bad:
        result.add(bad.faults)
    _check_files(result, config, tensors, source, recorded)
    if tensors is not None:
        _check_weights(result, Checkpoint(config, tensors), source, recorded, run_prompts)
    broken = result.broken_files
    for fault in manifest_faults(directory, recorded, result.digests):
        if fault.where not in broken:
            result.faults.append(fault)
    result.unchecked += unchecked_parts(directory, source, recorded)
    return result


def _other_dimensions(config: CheckpointConfig, source: Checkpoint) -> Fault | None:
    """The fault of a source whose tensors are not those that the export's config describes."""
    if Checkpoint(config, source.tensors).layout == source.layout:
        return None
    keys = []
    for fault in source_faults(config, source):
        if fault.where.endswith(CONFIG):
            keys.append(fault.what.partition(", in ")[0])
    what = "describes a model of other dimensions"
    if keys:
        what = f"{what} than {config.directory / CONFIG}, where {'; '.join(keys[:3])}"
    return Fault(str(source.directory), what, "is this the right --source?")


def _check_files(
    result: Verification,
    config: CheckpointConfig,
    tensors: TensorFiles | None,
    source: Checkpoint | None,
    recorded: Mapping[str, str],
) -> None:
    """Check the files beside the weights."""
    directory = config.directory
    known = dict(recorded)
    if tensors is not None:
        known |= dict.fromkeys(tensors.files, "")
    if source is not None:
        known |= source.companions.digests
    is_complete = bool(recorded) or source is not None
    broken_before = result.broken_files
    for fault in companion_faults(directory):
        if fault.where not in broken_before:
            result.faults.append(fault)
    for fault in stray_faults(directory, known, is_complete):
        if fault.where not in result.broken_files:
            result.faults.append(fault)
    broken = result.broken_files
    if source is not None:
        found = list(source_faults(config, source))
        result.faults += [fault for fault in found if fault.where not in broken]
        return
    if not is_proven(directory / CONFIG, recorded):
        for fault in config_faults(config):
            if fault.where not in broken:
                result.faults.append(fault)
    files = [directory / name for name in _CHAT_FILES]
    if broken & {str(file) for file in files}:
        return
    if not all(is_proven(file, recorded) for file in files if file.exists()):
        result.faults += tokenizer_faults(config)


def _check_weights(
    result: Verification,
    exported: Checkpoint,
    source: Checkpoint | None,
    recorded: Mapping[str, str],
    run_prompts: bool,
) -> None:
    """Check the quantization section, the layout and the values."""
    result.faults += section_faults(exported.config)
    try:
        formats = linear_formats(exported.config)
    except BadInput:  # section_faults has reported the same
        return
    if not quantization_section(exported.config):
        return
    wrong_layout = list(_layout_faults(exported, formats))
    result.faults += wrong_layout
    if wrong_layout:  # with tensors missing or mis-shaped there is nothing to compare
        return
    values = _values(exported, formats, source)
    result.digests = values.digests
    scales = [*fused_scale_faults(exported, formats), *range_faults(exported, formats)]
    result.faults += [*values.faults, *scales]
    if source is None or not run_prompts or values.faults or scales:
        return
    # Weight files with the SHA-256 that the run has recorded hold the scales that it calibrated and
    # measured; on another model than the tiny one, three prompts know less than that.
    if all(recorded.get(file) == digest for file, digest in values.digests.items()):
        return
    result.faults += input_range_faults(exported, formats, source)


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


def _values(exported: Checkpoint, formats: Mapping[str, str], source: Checkpoint | None) -> Values:
    tensors = None if source is None else source.tensors
    trained = trained_tensors(exported.directory)
    change = weight_change(exported.directory)
    return ValueCheck(exported, formats, tensors, trained, change).run()


def unchecked_parts(
    directory: Path, source: Checkpoint | None, recorded: Mapping[str, str]
) -> Iterator[str]:
    """Yield what is not checked of a directory, and why.

    Args:
        directory: The exported directory.
        source: The source that it is compared with.
        recorded: The digests that the manifest records.
    """
    if not recorded:
        what = "whether sound files are those that were written"
        yield f"{what} ({MANIFEST} records no SHA-256)"
    if source is None:
        yield "how far weights and input scales are from the BF16 model (give --source)"
        return
    trained = trained_tensors(directory)
    if trained:
        yield f"single weights of {len(trained)} tensors that a distillation has trained"
    if weight_change(directory) == "moved":
        yield "single weights, which the algorithm has moved"


def recorded_digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file by relative name, as the manifest records them."""
    recorded = recorded_section(directory, "files")
    return {name: digest for name, digest in recorded.items() if isinstance(digest, str)}


def trained_tensors(directory: Path) -> frozenset[str]:
    """Return the tensors that a distillation has moved away from the source, by the
    directory's own manifest.
    """
    named = recorded_section(directory, "distillation").get("trained")
    if not isinstance(named, list):
        return frozenset()
    return frozenset(name for name in named if isinstance(name, str))


def weight_change(directory: Path) -> Change:
    """Return what the calibration algorithm may have done to weights, by the manifest.

    Only rounding is allowed where the manifest names no algorithm.
    """
    section = recorded_section(directory, "recipe").get("quantize")
    name = section.get("algorithm") if isinstance(section, dict) else None
    if not isinstance(name, str) or name not in ALGORITHMS:
        return "rounded"
    return ALGORITHMS[name].change
