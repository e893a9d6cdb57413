"""What a run is going to need, measured and said before it starts: formats, bytes, memory, disk,
time.

Memory decides between the whole model at once and one layer at a time. The time comes from running
one layer of each kind once, on the device and with the weights of the run.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from calibrate.layerwise import runner
from calibrate.prompts import build_prompts
from calibrate.samples import Skipped
from checkpoint.atomic import check_output
from checkpoint.classes import KERNELS_MISSING
from checkpoint.config import CheckpointConfig
from checkpoint.faults import Fault, raise_if_any
from checkpoint.files import TensorFiles
from checkpoint.layers import largest_layer, layer_configs, layer_specs, single_layer
from checkpoint.layout import LANGUAGE_MODEL, LAYERS, language_model_linears, spec_bytes
from checkpoint.memory import device_available, host_available
from checkpoint.processes import RANK, RANKS
from export.manifest import read_manifest
from export.write import output_specs
from pipeline.streaming import Prompts, stream_state
from pipeline.verdict import say
from quantize.distill.batches import with_answer
from quantize.distill.distillation import Plan
from quantize.policy import Policy
from recipes.schema import Recipe

_PEEKED, _PEEKED_TO_TRAIN = 4, 32
"""Prompts built to tell how long they are: for memory, and for the hours of a training."""
_HOST_CAP = 22_000_000_000
"""Activations in host memory at most, so that the process stays under 32 GB with everything else it
holds.
"""
_PROCESS = 2_000_000_000
"""Host memory of Python, torch and ModelOpt themselves."""
_TRIED_TOKENS = {"cpu": 64, "cuda": 2048}


@dataclass(frozen=True)
class WorkPlan:
    """What a run needs, in bytes and seconds, against what there is.

    Attributes:
        streams: Whether the model goes through memory layer by layer.
        reason: Why it does, or does not.
        lines: What `show` prints.
        budget: Bytes of host memory for activations when it streams.
    """

    streams: bool
    reason: str
    lines: tuple[str, ...]
    budget: int

    def show(self) -> None:
        """Print the plan, once for all processes."""
        for line in self.lines if RANK == 0 else ():
            say(line)


@dataclass(frozen=True)
class _Tried:
    """A layer of each kind, run once.

    Attributes:
        seconds: For one token through all layers.
        workspace: Bytes of memory for one token in the layer that needs most.
    """

    seconds: float
    workspace: float


def plan_run(
    recipe: Recipe,
    config: CheckpointConfig,
    policy: Policy,
    source: TensorFiles,
    device: str,
    samples: Prompts,
    distillation: Plan | None = None,
) -> WorkPlan:
    """Choose how to run a recipe and check that it can end well.

    Args:
        recipe: The recipe.
        config: The BF16 checkpoint's.
        policy: Format by linear.
        source: The BF16 tensors; a layer of each kind is read.
        device: Where layers run.
        samples: Opens the calibration prompts.
        distillation: What follows the calibration.

    Raises:
        BadInput: The output exists, its disk or the device's memory is too small, a state of
            another run lies beside it, or the recipe forces a way that it cannot take.
    """
    state = stream_state(recipe, config, device)
    begun = state.directory.exists()
    faults = _way_faults(recipe)
    if not faults and recipe.quantize.memory != "whole" and recipe.distill is None:
        faults += state.faults()
    raise_if_any(faults)

    written = spec_bytes(output_specs(config, policy, source.specs))
    lengths = _lengths(samples, recipe.calibrate.video_pruning_rate)
    longest, mean = max(lengths), sum(lengths) / len(lengths)
    row = 2 * config.text["hidden_size"]
    activations = int(row * mean * (recipe.calibrate.samples + recipe.accuracy.samples))
    tried = _try_layers(config, source, device, int(mean))
    work = int(
        tried.workspace
        * max(longest, min(recipe.quantize.batch_tokens, mean * recipe.calibrate.samples))
    )
    whole = source.total_bytes + work
    layer = largest_layer(config)
    frame = spec_bytes({n: s for n, s in source.specs.items() if not n.startswith(LAYERS)})
    one_by_one = max(frame, 2 * layer + work)
    there = device_available(device)
    streams, reason = _choose(recipe, whole, there, begun)
    if streams and recipe.accuracy.tasks is not None:
        what = f"the whole model answers them, and this runs {reason}"
        faults.append(
            Fault(
                "accuracy.tasks",
                what,
                "give accuracy.tasks=null, then measure with python -m accuracy",
            )
        )
    needed = one_by_one if streams else whole
    if distillation:
        tower = source.total_bytes - spec_bytes(
            {n: s for n, s in source.specs.items() if n.startswith(LANGUAGE_MODEL)}
        )
        needed = max(needed, distillation.device_bytes + tower)
    if needed > there:
        remedy = "end what else uses it, lower calibrate.max_length or quantize.batch_tokens"
        remedy += "" if streams else ", or give quantize.memory=stream"
        if distillation:
            remedy = "FSDP2 divides the training among processes: accelerate launch, as recipes/nvfp4_qad.yaml says"
        faults.append(
            Fault(f"memory of {device}", f"needs {_gb(needed)}, {_gb(there)} are free", remedy)
        )
    host = host_available() - _PROCESS - (one_by_one if device == "cpu" else 4 * layer)
    cap = recipe.quantize.host_memory_gb
    budget = max(0, min(int(host * 0.8), _HOST_CAP if cap is None else int(cap * 1e9)))
    in_memory = min(activations, budget) if streams else 0
    # Two saves of the activations, the older one until the newer is whole, and what memory has no
    # room for.
    kept = 2 * activations + (activations - in_memory) if streams else 0
    if not (streams and state.written()) and not written_before(recipe, distillation):
        check_output(recipe.output, 0 if streams and begun else written)
    if not (streams and begun):
        faults += _disk_fault(recipe.output, written + kept)
    raise_if_any(faults)

    formats = ", ".join(f"{count} {format}" for format, count in policy.counts().items())
    seconds = tried.seconds * mean * recipe.calibrate.samples / RANKS
    host_need = _PROCESS + in_memory + (needed if device == "cpu" else 3 * layer)
    lines = [
        f"{config.directory}: {source.total_bytes / 1e9:.3f} GB → {recipe.output}: {written / 1e9:.3f} GB, {formats}",
        f"{recipe.calibrate.samples} samples of about {mean:,.0f} tokens, {reason}",
        f"needs about {_gb(needed)} of {_gb(there)} on {device}, {_gb(host_need)} of {_gb(host_available())} host"
        f" memory, {_gb(written + kept)} of disk; about {_duration(seconds)} for the layers",
    ]
    lines += _kernel_line(device)
    if distillation:
        lines.append(_training_line(distillation, tried.seconds))
    if streams and begun:
        lines.append(
            f"goes on after layer {state.progress()[0]} of {len(config.pattern)}, from {state.directory}"
        )
    return WorkPlan(streams, reason, tuple(lines), budget)


def written_before(recipe: Recipe, distillation: Plan | None) -> bool:
    """Whether the output is that of this distillation, killed after it was written and before it
    was measured.
    """
    if distillation is None or not distillation.directory.exists():
        return False
    manifest = read_manifest(recipe.output)
    return manifest is not None and manifest.recipe == recipe.model_dump(mode="json")


def _kernel_line(device: str) -> list[str]:
    """What is said where a GPU does without mamba_ssm's kernels."""
    if not KERNELS_MISSING or not device.startswith("cuda"):
        return []
    slow = "Mamba layers run in plain PyTorch, and the 12B about half as fast"
    return [f"{slow}: {KERNELS_MISSING}; `make setup DEVICE=cuda` installs it"]


def _training_line(plan: Plan, seconds: float) -> str:
    """What is distilled and how long it may take, from the seconds of one token's forward through
    all layers.
    """
    opened = (with_answer(sample) for sample in plan.samples())
    rate, settings = plan.settings.video_pruning_rates[0], plan.settings
    limit = min(settings.max_length, plan.config.max_length)
    skipped = Skipped(2**31)
    prompts = build_prompts(
        opened,
        plan.config,
        plan.tokenizer,
        count=_PEEKED_TO_TRAIN,
        skipped=skipped,
        max_length=limit,
    )
    lengths = [prompt.served_length(rate) for prompt in prompts]
    mean = sum(lengths) / len(lengths)
    # A backward costs two forwards; the teacher has one of its own, and checkpointed layers run
    # once more.
    forwards = 3 + plan.taught + settings.gradient_checkpointing
    steps = f"{settings.steps} steps of {settings.batch} samples of about {mean:,.0f} tokens"
    took = _duration(seconds * forwards * mean * settings.steps * settings.batch / RANKS)
    trained = f"{len(plan.trained)} linears, {plan.weights / 1e6:,.1f} million weights"
    return f"then {trained}, train for {steps}: about {took}; activations need memory besides"


def _way_faults(recipe: Recipe) -> list[Fault]:
    memory, faults = recipe.quantize.memory, []
    if memory == "stream" and recipe.quantize.algorithm != "max":
        what = f"stream knows max calibration only, not {recipe.quantize.algorithm}"
        faults.append(
            Fault("quantize.memory", what, "give quantize.memory=whole or quantize.algorithm=max")
        )
    if memory == "stream" and recipe.quantize.auto is not None:
        faults.append(
            Fault("quantize.memory", "quantize.auto scores the whole model", "give auto or whole")
        )
    if memory == "stream" and recipe.distill is not None:
        faults.append(
            Fault(
                "quantize.memory",
                "a recipe with distill needs the whole model",
                "give auto or whole",
            )
        )
    if memory == "whole" and RANKS > 1 and recipe.distill is None:
        what = f"{RANKS} processes share samples layer by layer"
        faults.append(Fault("quantize.memory", what, "give auto or stream, or start one process"))
    if (
        memory != "stream"
        and RANKS > 1
        and recipe.distill is None
        and recipe.quantize.algorithm != "max"
    ):
        what = f"{recipe.quantize.algorithm} runs in one process"
        faults.append(Fault("quantize.algorithm", what, "start one process"))
    return faults


def _choose(recipe: Recipe, whole: int, there: int, begun: bool) -> tuple[bool, str]:
    """Whether to go layer by layer, and why."""
    if recipe.quantize.memory != "auto":
        return recipe.quantize.memory == "stream", f"quantize.memory is {recipe.quantize.memory}"
    if (
        recipe.distill is not None
        or recipe.quantize.algorithm != "max"
        or recipe.quantize.auto is not None
    ):
        return (
            False,
            "the whole model in memory, as distillation, quantize.auto and every algorithm but max need it",
        )
    if RANKS > 1:
        return True, f"shared by {RANKS} processes layer by layer"
    if begun:
        return True, "layer by layer, as it was begun"
    if whole > there:
        return True, f"layer by layer: the whole model needs {_gb(whole)}, {_gb(there)} are free"
    return False, "the whole model in memory"


def _lengths(samples: Prompts, rate: float) -> list[int]:
    opened = samples(skipped=Skipped(2**31))
    return [prompt.served_length(rate) for prompt in itertools.islice(opened, _PEEKED)]


@torch.no_grad()
def _try_layers(config: CheckpointConfig, source: TensorFiles, device: str, mean: int) -> _Tried:
    cuda = device.startswith("cuda")
    tokens = max(1, min(mean, _TRIED_TOKENS["cuda" if cuda else "cpu"]))
    kinds = [config.mixer_kind(layer) for layer in range(len(config.pattern))]
    seconds, workspace, configs = 0.0, 0.0, layer_configs(config)
    inputs = torch.randn(1, tokens, config.text["hidden_size"], dtype=torch.bfloat16, device=device)
    for kind in sorted(set(kinds)):
        layer = kinds.index(kind)
        tensors = {name: source.read(name).to(device) for name in layer_specs(config, layer)}
        run = runner(single_layer(configs, layer, tensors))
        run(inputs)  # kernels are compiled and chosen here
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        run(inputs)
        if cuda:
            torch.cuda.synchronize(device)
            workspace = max(workspace, (torch.cuda.max_memory_allocated(device) - before) / tokens)
        seconds += (time.perf_counter() - start) / tokens * kinds.count(kind)
        del run, tensors
    return _Tried(seconds, workspace or _workspace(config))


def _workspace(config: CheckpointConfig) -> float:
    """Bytes a token needs while a layer computes on a CPU, where nothing counts them.

    transformers' plain Mamba-2 spreads B and C over all heads in float32 and has scores of every
    position with its chunk; the rest is a few copies of the widest activation.
    """
    text = config.text
    scan = (
        4
        * text["mamba_num_heads"]
        * (3 * text["ssm_state_size"] + 4 * text["chunk_size"] + text["mamba_head_dim"])
    )
    widest = max(max(linear.shape) for linear in language_model_linears(config))
    return scan + 4 * 2 * widest


def _disk_fault(output: Path, needed: int) -> list[Fault]:
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed * 1.01 <= free:
        return []
    what = f"needs {_gb(needed)} with the activations kept beside it, {_gb(free)} are free"
    return [
        Fault(
            str(output), what, "free some space, give an output on another disk, or fewer samples"
        )
    ]


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
