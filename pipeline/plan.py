"""What a run will need, measured before it starts: formats, bytes, memory, disk, time.

Memory decides between the whole model at once and layer by layer. The time comes from running one
layer of each kind once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from calibrate.prompts import build_prompts
from calibrate.samples import Skipped
from checkpoint.atomic import space_faults
from checkpoint.command import command_name
from checkpoint.faults import Fault, raise_if_any
from checkpoint.layer_cost import LayerCost, measure_layer_cost
from checkpoint.layers import largest_layer, outside_layers
from checkpoint.layout import select_prefix, spec_bytes
from checkpoint.libraries import find_mamba_kernels
from checkpoint.log import get_logger
from checkpoint.memory import device_available, host_available
from checkpoint.opened import rounding_note
from checkpoint.processes import Processes
from export.layout import output_specs
from pipeline.inputs import available_samples
from pipeline.job import Job, Way
from pipeline.layer_by_layer import LayerByLayer
from pipeline.layer_state import LAYER_PROGRESS
from pipeline.whole import WholeModel
from quantize.distill.checkpoints import checkpoint_faults
from quantize.distill.plan import DistillationPlan
from quantize.distill.rows import with_answer

logger = get_logger(__name__)

_PEEKED = 4
"""Prompts built to tell how long they are."""

_SKIPPED_WHILE_PEEKING = 200
"""Samples that the plan may find unusable before it gives up, if max_skipped is lower."""

_PEEKED_TO_TRAIN = 32
"""The same for a training, whose hours depend on it."""

_LARGEST_BUDGET = 22_000_000_000
"""Activations in host memory at most, so that the process stays under 32 GB with all it holds."""

_TIGHT = 0.9
"""Share of a device's memory from which the estimated peak of a training may be too much: peaks
have been measured within a tenth of the estimate."""

_HOPELESS = 2.0
"""Share from which a training on packed rows, which are always full, is refused: no estimate has
been that far off.
"""

_PROCESS_BYTES = 2_000_000_000
"""Host memory of Python, torch and ModelOpt themselves."""


@dataclass(frozen=True)
class Needs:
    """What a run needs.

    Attributes:
        written: Bytes of the output.
        samples: Number of calibration samples.
        mean_length: Mean tokens of a sample.
        longest: Most tokens of a sample.
        activations: Bytes of all samples between two layers.
        whole: Bytes of device memory with the whole model.
        one_by_one: Bytes of device memory layer by layer.
        cost: Of one token in all layers.
    """

    written: int
    samples: int
    mean_length: float
    longest: int
    activations: int
    whole: int
    one_by_one: int
    cost: LayerCost


@dataclass(frozen=True)
class Plan:
    """How a run will go.

    Attributes:
        layer_by_layer: Whether the model goes through memory layer by layer.
        reason: Why.
        lines: What `log` prints.
        budget: Bytes of host memory for activations, if layer by layer.
    """

    layer_by_layer: bool
    reason: str
    lines: tuple[str, ...]
    budget: int

    def log(self, processes: Processes) -> None:
        """Log the plan, once for all processes."""
        if processes.is_first:
            for line in self.lines:
                logger.info(line)


def choose_way(plan: Plan, job: Job) -> Way:
    """Return the way that the plan chose."""
    if plan.layer_by_layer:
        return LayerByLayer(job, plan.budget)
    return WholeModel(job)


def make_plan(job: Job) -> Plan:
    """Choose how a job runs and check that it can end well.

    Raises:
        BadInput: The output exists, its disk or the device's memory is too small, another run's
            state lies beside it, or the recipe demands a way that it cannot take.
    """
    raise_if_any([*_way_faults(job), *job.state.faults()])
    if job.distillation is not None and job.state.is_begun and job.processes.is_first:
        raise_if_any(checkpoint_faults(job.distillation.directory))
    needs = _measure_needs(job)
    available = device_available(job.device)
    layer_by_layer, reason = _choose(job, needs.whole, available)
    needed = needs.one_by_one if layer_by_layer else needs.whole
    if job.distillation is not None:
        needed = max(needed, job.distillation.device_bytes + _outside_language_model(job))
    budget = _activation_budget(job, needs)
    in_memory = min(needs.activations, budget) if layer_by_layer else 0
    # Two saves of the activations, the older one until the newer is whole, and what host memory has
    # no room for.
    kept = 3 * needs.activations - in_memory if layer_by_layer else 0
    faults = list(_task_faults(job, layer_by_layer, reason))
    faults += _memory_faults(job, needed, available, layer_by_layer)
    if job.distillation is not None:
        faults += row_faults(
            job.distillation.settings.pack_length, job.distillation.peak_bytes, available
        )
    faults += _disk_faults(job, needs.written + kept)
    raise_if_any(faults)
    layers_in_host = needed if job.device == "cpu" else 3 * largest_layer(job.checkpoint)
    host = _PROCESS_BYTES + in_memory + layers_in_host
    seconds = needs.cost.seconds * needs.mean_length * needs.samples / job.processes.count
    needed_parts = [
        f"{_gb(needed)} of {_gb(available)} on {job.device}",
        f"{_gb(host)} of {_gb(host_available())} host memory",
        f"{_gb(needs.written + kept)} of disk; about {_duration(seconds)} for the layers",
    ]
    lines = [
        _size_line(job, needs.written),
        _samples_line(job, needs, reason),
        f"video: {job.recipe.video}",
        job.checkpoint.companions.summary(),
        f"needs about {', '.join(needed_parts)}",
    ]
    rounded = rounding_note(job.checkpoint)
    if rounded is not None:
        lines.insert(0, rounded)
    lines += kernel_lines(job.device)
    if job.distillation is not None:
        lines.append(_training_line(job.distillation, needs.cost.seconds))
        lines += tight_lines(job.distillation.peak_bytes, available)
    if job.state.is_begun:
        lines.append(f"resumes from {job.state.directory}")
    return Plan(layer_by_layer, reason, tuple(lines), budget)


def _skipped_while_peeking(max_skipped: int) -> Skipped:
    """Return what takes unusable samples while the plan looks at the first ones.

    Without a limit, a generator of samples that are all too long would be drawn from forever.
    """
    return Skipped(max(max_skipped, _SKIPPED_WHILE_PEEKING))


def _measure_needs(job: Job) -> Needs:
    checkpoint = job.checkpoint
    recipe = job.recipe
    prompts = job.calibration_prompts(_skipped_while_peeking(recipe.calibrate.max_skipped))
    lengths = [prompt.length for prompt in itertools.islice(prompts, _PEEKED)]
    mean = sum(lengths) / len(lengths)
    longest = max(lengths)
    samples = available_samples(recipe.calibrate)
    # Sources that end within the peek have no more usable samples than that.
    if len(lengths) < _PEEKED:
        samples = len(lengths)
    activation = 2 * checkpoint.config.hidden_size * mean
    cost = measure_layer_cost(checkpoint, job.device, int(mean))
    at_once = max(longest, min(recipe.quantize.batch_tokens, mean * samples))
    workspace = int(cost.workspace * at_once)
    return Needs(
        written=spec_bytes(output_specs(checkpoint, job.policy)) + checkpoint.companions.nbytes,
        samples=samples,
        mean_length=mean,
        longest=longest,
        activations=int(activation * (samples + available_samples(recipe.accuracy))),
        whole=spec_bytes(checkpoint.tensors.specs) + workspace,
        one_by_one=max(outside_layers(checkpoint), 2 * largest_layer(checkpoint) + workspace),
        cost=cost,
    )


def _outside_language_model(job: Job) -> int:
    """Bytes of vision tower and projector."""
    specs = job.checkpoint.tensors.specs
    language_model = select_prefix(specs, job.checkpoint.config.family.language_model)
    return spec_bytes(specs) - spec_bytes(language_model)


def _activation_budget(job: Job, needs: Needs) -> int:
    """Bytes of host memory that activations may take."""
    held = needs.one_by_one if job.device == "cpu" else 4 * largest_layer(job.checkpoint)
    free = host_available() - _PROCESS_BYTES - held
    limit = job.recipe.quantize.host_memory_gb
    most = _LARGEST_BUDGET if limit is None else int(limit * 1e9)
    return max(0, min(int(free * 0.8), most))


def _way_faults(job: Job) -> Iterator[Fault]:
    """Yield what the recipe demands and cannot have."""
    quantize = job.recipe.quantize
    distils = job.recipe.distill is not None
    shares_samples = job.processes.count > 1 and not distils
    if quantize.memory == "layers":
        if quantize.algorithm != "max":
            what = f"layer by layer only max calibration runs, not {quantize.algorithm}"
            remedy = "give quantize.memory=whole or quantize.algorithm=max"
            yield Fault("quantize.memory", what, remedy)
        if quantize.auto is not None:
            what = "quantize.auto scores the whole model"
            yield Fault("quantize.memory", what, "give auto or whole")
        if distils:
            what = "a recipe with distill needs the whole model"
            yield Fault("quantize.memory", what, "give auto or whole")
    if shares_samples:
        samples = available_samples(job.recipe.calibrate)
        if samples < job.processes.count:
            what = f"{samples} samples for {job.processes.count} processes"
            yield Fault("calibrate.samples", what, "start fewer processes")
    if quantize.memory == "layers":
        return
    if shares_samples and quantize.memory == "whole":
        what = f"{job.processes.count} processes share samples layer by layer"
        yield Fault("quantize.memory", what, "give auto or layers, or start one process")
    elif shares_samples and quantize.algorithm != "max":
        what = f"{quantize.algorithm} runs in one process"
        yield Fault("quantize.algorithm", what, "start one process")


def _choose(job: Job, whole: int, available: int) -> tuple[bool, str]:
    """Whether to run layer by layer, and why."""
    quantize = job.recipe.quantize
    if quantize.memory != "auto":
        return quantize.memory == "layers", f"quantize.memory is {quantize.memory}"
    needing_whole = []
    if job.recipe.distill is not None:
        needing_whole.append("distillation")
    if quantize.auto is not None:
        needing_whole.append("quantize.auto")
    if quantize.algorithm != "max":
        needing_whole.append(f"quantize.algorithm={quantize.algorithm}")
    if needing_whole:
        return False, f"the whole model in memory, for {' and '.join(needing_whole)}"
    if job.processes.count > 1:
        return True, f"shared by {job.processes.count} processes layer by layer"
    if not LAYER_PROGRESS.isdisjoint(job.state.progress()):
        return True, "layer by layer, as it was begun"
    if whole > available:
        needs = f"the whole model needs {_gb(whole)}, {_gb(available)} are free"
        return True, f"layer by layer: {needs}"
    return False, "the whole model in memory"


def _task_faults(job: Job, layer_by_layer: bool, reason: str) -> Iterator[Fault]:
    if layer_by_layer and job.recipe.accuracy.tasks is not None:
        what = f"the whole model answers them, and this run goes {reason}"
        remedy = f"give accuracy.tasks=null, then measure with {command_name('accuracy')}"
        yield Fault("accuracy.tasks", what, remedy)


def _memory_faults(job: Job, needed: int, available: int, layer_by_layer: bool) -> Iterator[Fault]:
    if needed <= available:
        return
    remedy = "end what else uses it, lower calibrate.max_length or quantize.batch_tokens"
    if not layer_by_layer:
        remedy = f"{remedy}, or give quantize.memory=layers"
    if job.distillation is not None:
        remedy = "FSDP2 divides the training among processes: see recipes/nvfp4_qad.yaml"
    what = f"needs {_gb(needed)}, {_gb(available)} are free"
    yield Fault(f"memory of {job.device}", what, remedy)


def _disk_faults(job: Job, needed: int) -> Iterator[Fault]:
    """Yield a fault of a disk that is too small; that of a resumed run has been checked."""
    if not job.state.is_written and not job.state.is_begun:
        yield from space_faults(job.recipe.output, needed, " with what is kept beside it")


def _samples_line(job: Job, needs: Needs, reason: str) -> str:
    asked = job.recipe.calibrate.samples
    found = str(needs.samples)
    if needs.samples < asked:
        found = f"{found} of the {asked:,}"
    return f"{found} samples of about {needs.mean_length:,.0f} tokens, {reason}"


def _size_line(job: Job, written: int) -> str:
    formats = ", ".join(f"{count} {name}" for name, count in job.policy.counts().items())
    source = f"{job.checkpoint.directory}: {job.checkpoint.tensors.total_bytes / 1e9:.3f} GB"
    return f"{source} → {job.recipe.output}: {written / 1e9:.3f} GB, {formats}"


def kernel_lines(device: str) -> Iterable[str]:
    """What to say about a GPU on which mamba_ssm's kernels are not used."""
    reason = find_mamba_kernels() if device.startswith("cuda") else None
    if reason is None:
        return []
    slow = "Mamba layers run in plain PyTorch, and the 12B about half as fast"
    return [f"{slow}: {reason}; `make setup DEVICE=cuda` installs it"]


def _training_line(plan: DistillationPlan, seconds: float) -> str:
    """What is distilled and how long it may take.

    Args:
        plan: The distillation.
        seconds: For one token's forward through all layers.
    """
    settings = plan.settings
    config = plan.checkpoint.config
    video = plan.video.with_rate(plan.rates[0])
    prompts = build_prompts(
        (with_answer(sample) for sample in plan.samples(plan.skipped)),
        config,
        plan.checkpoint.tokenizer,
        video,
        count=_PEEKED_TO_TRAIN,
        skipped=_skipped_while_peeking(settings.max_skipped),
        max_length=min(settings.max_length, config.max_length),
        name="distill.sources",
    )
    lengths = [prompt.length for prompt in prompts]
    mean = sum(lengths) / len(lengths)
    # A backward pass costs two forward passes; the teacher has its own, and checkpointed
    # layers run once more.
    forwards = 3 + int(plan.is_taught) + int(settings.gradient_checkpointing)
    row = settings.pack_length or mean
    tokens = row * settings.steps * settings.batch / plan.processes.count
    trained = f"{len(plan.trained)} tensors, {plan.weight_count / 1e6:,.1f} million weights"
    steps = f"{settings.steps} steps of {settings.batch} samples of about {mean:,.0f} tokens"
    if settings.pack_length is not None:
        rows = "1 row" if settings.batch == 1 else f"{settings.batch} rows"
        steps = f"{settings.steps} steps of {rows} of {row:,} tokens"
        steps += f", each about {row / mean:,.0f} samples"
    duration = _duration(seconds * forwards * tokens)
    peak = f"{_gb(plan.peak_bytes)} a process at the peak, as estimated"
    return f"then {trained}, train for {steps}: about {duration}, {peak}"


def tight_lines(peak: int, available: int) -> Iterable[str]:
    """What to say about a training whose estimated peak nearly fills a device.

    Args:
        peak: The estimate, in bytes.
        available: Bytes of memory of the device.
    """
    share = peak / available
    if share <= _TIGHT:
        return []
    advice = "lower distill.pack_length or distill.max_length, or start more processes"
    return [f"the peak is {share:.0%} of the memory, and may be more than there is: {advice}"]


def row_faults(pack_length: int | None, peak: int, available: int) -> Iterator[Fault]:
    """Yield a fault when packed rows cannot fit a device: they would be filled for hours first.

    Args:
        pack_length: Tokens of a packed row; None where rows are single samples, which may all be
            short.
        peak: The estimate, in bytes.
        available: Bytes of memory of the device.
    """
    if pack_length is not None and peak > _HOPELESS * available:
        what = f"rows of {pack_length:,} tokens need about {_gb(peak)}, {_gb(available)} are free"
        yield Fault("distill.pack_length", what, "lower it, or start more processes")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
