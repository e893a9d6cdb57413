"""What is known about an exported directory: manifest, config and file headers as one value.

The report, the model card and the upload show these facts and read nothing else. A manifest of an
older version has fewer of them: what is not recorded is None or empty, never an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.config import CheckpointConfig, read_json
from checkpoint.content import MANIFEST
from checkpoint.faults import BadInput, Fault, shortened
from checkpoint.layout import Linear, Specs, expected_tensors, spec_bytes
from checkpoint.opened import Checkpoint, open_checkpoint
from checkpoint.video import Video
from export.layout import has_kv_scales, linear_formats, quantization_section
from export.publish.recorded import (
    Agreement,
    Task,
    agreement_rows,
    calibration_counts,
    mapping,
    numbers,
    recorded_hashes,
    recorded_video,
    source_lines,
    strings,
    task_rows,
    text,
    texts,
    without_folders,
)
from export.publish.suites import Benchmarks, recorded_benchmarks
from quantize.formats.registry import FORMATS, UNQUANTIZED

BF16 = "BF16"


@dataclass(frozen=True)
class LinearFacts:
    """One linear of a layer.

    Attributes:
        name: Its checkpoint name.
        format: What people call its format: `FP8`, `NVFP4`, `BF16`.
        error: ‖quantized − BF16‖ / ‖BF16‖ of its weight; None for a linear in BF16.
    """

    name: str
    format: str
    error: float | None

    @property
    def short(self) -> str:
        """The last part of the name: `in_proj`, `q_proj`, …"""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class LayerFacts:
    """One layer of the hybrid stack.

    Attributes:
        index: Its place, from 0.
        kind: `mamba`, `mlp` or `attention`.
        linears: Its linears, in order.
        before: Bytes of its tensors in BF16.
        after: Bytes of its tensors in the export.
    """

    index: int
    kind: str
    linears: tuple[LinearFacts, ...]
    before: int
    after: int

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of its linears, each once."""
        return tuple(dict.fromkeys(linear.format for linear in self.linears))

    @property
    def error(self) -> float | None:
        """The largest error of its linears; None when all are BF16."""
        errors = [linear.error for linear in self.linears if linear.error is not None]
        return max(errors, default=None)


@dataclass(frozen=True)
class Size:
    """Bytes of one part of the model, before and after."""

    part: str
    before: int
    after: int


@dataclass(frozen=True)
class Facts:
    """Everything that report, card and upload show.

    Attributes:
        directory: The exported directory.
        config: Its configuration.
        algo: `quant_algo` of config.json: FP8, NVFP4, W4A16_NVFP4 or MIXED_PRECISION.
        formats: Number of linears by format, BF16 included.
        kv_cache: Whether the KV cache is quantized to FP8.
        layers: The hybrid stack.
        errors_are_measured: Whether the layers' errors were measured against the source; otherwise
            they are what rounding to the format gives.
        sizes: By part of the model.
        gate_passed: None when it was not measured.
        missed: What the gate missed, a sentence each.
        agreement: By kind of sample, all samples first.
        tasks: By task, the mean last.
        benchmarks: Outcomes of published benchmarks.
        calibration: Counts of the calibration, by name.
        sources: What was calibrated on, a line each.
        algorithm: Name of the calibration algorithm; empty when it is not recorded.
        sample_hashes: Number of calibration samples whose hashes the manifest records.
        seconds: By step of the run, as far as recorded.
        video: How clips are seen.
        versions: Of packages.
        trained: Number of tensors that a distillation has trained.
        model: What the recipe named as the source.
        revision: The source's revision; empty when it is not recorded.
        files: SHA-256 by file name, as recorded; empty when it is not.
    """

    directory: Path
    config: CheckpointConfig
    algo: str
    formats: Mapping[str, int]
    kv_cache: bool
    layers: tuple[LayerFacts, ...]
    errors_are_measured: bool
    sizes: tuple[Size, ...]
    gate_passed: bool | None = None
    missed: tuple[str, ...] = ()
    agreement: tuple[Agreement, ...] = ()
    tasks: tuple[Task, ...] = ()
    benchmarks: tuple[Benchmarks, ...] = ()
    calibration: Mapping[str, int] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    algorithm: str = ""
    sample_hashes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    video: Video = field(default_factory=Video)
    versions: Mapping[str, str] = field(default_factory=dict)
    trained: int = 0
    model: str = ""
    revision: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_failed(self) -> bool:
        """Whether the gate failed, or a published benchmark has lost more than is allowed."""
        has_lost = any(outcome.lost for outcome in self.benchmarks)
        return self.gate_passed is False or has_lost

    @property
    def all_tasks(self) -> tuple[Task, ...]:
        """The rows of the exact tasks, then those of the benchmarks."""
        found = list(self.tasks)
        for outcome in self.benchmarks:
            found += outcome.tasks
        return tuple(found)

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.directory.resolve().name

    @property
    def format_names(self) -> str:
        """The formats as people say them: `FP8`, or `NVFP4 and FP8` for a mix."""
        return " and ".join(label for label in self.formats if label != BF16)

    @property
    def source_name(self) -> str:
        """What was quantized, without the folders of the machine that did it."""
        return without_folders(self.model)

    @property
    def before(self) -> int:
        """Bytes of all tensors in BF16."""
        return sum(size.before for size in self.sizes)

    @property
    def after(self) -> int:
        """Bytes of all tensors in the export."""
        return sum(size.after for size in self.sizes)


def read_facts(
    directory: Path,
    errors: Mapping[str, float] | None = None,
    tasks: tuple[Task, ...] = (),
    benchmarks: tuple[Benchmarks, ...] = (),
) -> Facts:
    """Read the facts of an exported directory; of weights, only the headers.

    Args:
        directory: The exported directory.
        errors: Measured error of each quantized linear (`export.publish.errors`); without it the
            format's own rounding error is used.
        tasks: Rows of a later measurement, used instead of the gate's.
        benchmarks: Outcomes of a later measurement, used instead of the gate's.

    Raises:
        BadInput: It is not a quantized checkpoint, or its manifest is not JSON.
    """
    exported = open_checkpoint(directory)
    section = quantization_section(exported.config)
    if not section:
        what = "has no quantization_config, so it is not an export"
        raise BadInput(Fault(str(directory / "config.json"), what, "give an exported directory"))
    formats = linear_formats(exported.config)
    path = directory / MANIFEST
    manifest = read_json(path) if path.exists() else {}
    recipe = mapping(manifest, "recipe")
    gate = mapping(manifest, "gate")
    linears = _linear_facts(exported, formats, errors)
    passed = gate.get("passed")
    return Facts(
        directory=directory,
        config=exported.config,
        algo=shortened(section.get("quant_algo"), 40).upper(),
        formats=_counts(linears.values()),
        kv_cache=has_kv_scales(section),
        layers=_layers(exported, linears),
        errors_are_measured=errors is not None,
        sizes=_sizes(exported),
        gate_passed=passed if isinstance(passed, bool) else None,
        missed=texts(gate.get("missed")),
        agreement=agreement_rows(gate),
        tasks=tasks or task_rows(gate.get("tasks")),
        benchmarks=benchmarks or recorded_benchmarks(gate),
        calibration=calibration_counts(manifest),
        sources=source_lines(recipe),
        algorithm=text(mapping(recipe, "quantize").get("algorithm")),
        sample_hashes=len(texts(mapping(manifest, "calibration").get("digests"))),
        seconds=numbers(mapping(mapping(manifest, "times"), "seconds")),
        video=recorded_video(manifest),
        versions=strings(mapping(manifest, "versions")),
        trained=len(texts(mapping(manifest, "distillation").get("trained"))),
        model=text(recipe.get("model")),
        revision=text(mapping(manifest, "source").get("revision")),
        files=recorded_hashes(manifest),
    )


def format_label(format: str) -> str:
    """Return what people call a format: `FP8` for fp8, `BF16` for what is not quantized."""
    return BF16 if format == UNQUANTIZED else FORMATS[format].algo


def _linear_facts(
    exported: Checkpoint, formats: Mapping[str, str], errors: Mapping[str, float] | None
) -> dict[str, LinearFacts]:
    found = {}
    for linear in exported.linears:
        format = formats.get(linear.name, UNQUANTIZED)
        error = None
        if format != UNQUANTIZED:
            error = FORMATS[format].relative_error
            if errors is not None:
                error = errors.get(linear.name, error)
        found[linear.name] = LinearFacts(linear.name, format_label(format), error)
    return found


def _counts(linears: Iterable[LinearFacts]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for linear in linears:
        counts[linear.format] = counts.get(linear.format, 0) + 1
    return counts


def _layers(exported: Checkpoint, linears: Mapping[str, LinearFacts]) -> tuple[LayerFacts, ...]:
    config = exported.config
    before = _bytes_by_layer(expected_tensors(config), config)
    after = _bytes_by_layer(exported.tensors.specs, config)
    by_layer: dict[int, list[Linear]] = {}
    for linear in exported.linears:
        by_layer.setdefault(linear.layer, []).append(linear)
    layers = []
    for index in range(config.depth):
        own = tuple(linears[linear.name] for linear in by_layer.get(index, []))
        kind = config.mixer_kind(index)
        layers.append(LayerFacts(index, kind, own, before.get(index, 0), after.get(index, 0)))
    return tuple(layers)


def _bytes_by_layer(specs: Specs, config: CheckpointConfig) -> dict[int | None, int]:
    found: dict[int | None, int] = {}
    for name, spec in specs.items():
        layer = config.family.layer_of(name)
        found[layer] = found.get(layer, 0) + spec.nbytes
    return found


def _sizes(exported: Checkpoint) -> tuple[Size, ...]:
    """Bytes by part. Tensors that a checkpoint may lack count alike on both sides."""
    config = exported.config
    before = dict(expected_tensors(config))
    after = exported.tensors.specs
    for name in config.family.optional_tensors:
        if name in after:
            before[name] = after[name]
    kinds = dict.fromkeys(config.family.mixers.values())
    parts = [*(f"{kind} layers" for kind in kinds), "embeddings and head", "projector"]
    parts.append("vision tower")
    sizes = []
    for part in parts:
        own_before = {name: spec for name, spec in before.items() if _part(name, config) == part}
        own_after = {name: spec for name, spec in after.items() if _part(name, config) == part}
        sizes.append(Size(part, spec_bytes(own_before), spec_bytes(own_after)))
    return tuple(size for size in sizes if size.before or size.after)


def _part(name: str, config: CheckpointConfig) -> str:
    layer = config.family.layer_of(name)
    if layer is not None and layer < config.depth:
        return f"{config.mixer_kind(layer)} layers"
    if name.startswith(config.family.projector):
        return "projector"
    if name.startswith(config.family.vision):
        return "vision tower"
    return "embeddings and head"
