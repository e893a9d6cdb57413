"""What a distillation will need: checked and counted before any weight is loaded."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import parse_flag_from_env

from calibrate.samples import Sample, Skipped
from checkpoint.atomic import space_faults
from checkpoint.config import CheckpointConfig
from checkpoint.faults import Fault, raise_if_any
from checkpoint.layout import select_prefix, spec_bytes
from checkpoint.libraries import find_mamba_kernels
from checkpoint.opened import Checkpoint
from checkpoint.processes import Processes
from checkpoint.video import Video
from quantize.distill.loss import POSITIONS
from quantize.distill.settings import Distill
from quantize.policy import Policy

_BF16 = 2
_FLOAT32 = 4
"""Bytes of a number."""

_MOMENTS = 2 * _FLOAT32
"""Bytes of AdamW's two moments of a weight."""

_TENSORS_INSIDE = 8
"""Tensors of a layer's inner width that its backward holds: input, activation, both quantized, and
their gradients."""

_SCAN_TENSORS = 10
"""Tensors of heads by (state and chunk) that the scan in plain PyTorch holds for its backward, in
float32. Fitted to an H100's peaks, which samples padded to each other's length are part of."""

_LOSS_TENSORS = 6
"""Tensors of a piece's logits that the loss and its backward hold at once."""

# accelerate's launcher passes its FSDP options through the environment only; the object that holds
# them exists from the trainer's construction on, which is after the weights are loaded.
_FSDP = "ACCELERATE_USE_FSDP"
_FSDP_EMPTY_WEIGHTS = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@dataclass(frozen=True)
class DistillationPlan:
    """A checked distillation; made by `plan_distillation`.

    Attributes:
        settings: The recipe's section.
        trained: Names of the tensors that train.
        directory: Where checkpoints are kept while it runs, and resumed from.
        samples: Opens one pass over the training samples, the same at every call. It gives the rows
            that are no samples to the `Skipped`.
        skipped: Counts the samples that cannot be used, and those rows.
        checkpoint: The BF16 checkpoint.
        policy: Format by linear.
        video: How clips are sampled; their EVS rates are `rates`.
        processes: The processes that train.
        device: `cpu` or `cuda`, under a launcher with the number of the process's GPU.
        record: Called on the first process with the number of the step after each checkpoint that
            is whole on disk.
        is_sharded: Whether FSDP divides the models among the processes.
    """

    settings: Distill
    trained: tuple[str, ...]
    directory: Path
    samples: Callable[[Skipped], Iterator[Sample]]
    skipped: Skipped
    checkpoint: Checkpoint
    policy: Policy
    video: Video
    processes: Processes
    device: str
    record: Callable[[int], None]
    is_sharded: bool

    @property
    def is_taught(self) -> bool:
        """Whether BF16 is the teacher; without it, the run is QAT."""
        return self.settings.loss == "kl"

    @property
    def rates(self) -> tuple[float, ...]:
        """EVS rates of the clips; each sample draws one."""
        return self.settings.video_pruning_rates or (self.video.pruning_rate,)

    @property
    def weight_count(self) -> int:
        """Number of weights that train."""
        return sum(math.prod(self.checkpoint.layout[name].shape) for name in self.trained)

    @property
    def trains_embeddings(self) -> bool:
        """Whether the token embeddings train."""
        return f"{self.checkpoint.config.family.embeddings}.weight" in self.trained

    @property
    def device_bytes(self) -> int:
        """Memory that the language model and its training take on each process's device, without
        activations.
        """
        return training_bytes(
            self._language_model_bytes, self.weight_count, self.is_taught, self._shards
        )

    @property
    def peak_bytes(self) -> int:
        """An estimate of the peak: `device_bytes` and the activations of the longest sample."""
        config = self.checkpoint.config
        settings = self.settings
        tokens = settings.pack_length or min(settings.max_length, config.max_length)
        is_plain = find_mamba_kernels() is not None
        peak = training_bytes(
            self._language_model_bytes,
            self.weight_count,
            self.is_taught,
            self._shards,
            activation_bytes(config, tokens, settings.gradient_checkpointing, is_plain),
        )
        if self.is_sharded:
            peak += gathered_bytes(self.checkpoint, self.trained, self.is_taught)
        return max(peak, self.device_bytes)

    @property
    def _shards(self) -> int:
        return self.processes.count if self.is_sharded else 1

    @property
    def state_bytes(self) -> int:
        """Bytes of `directory` at its largest."""
        sharded = self._language_model_bytes if self.is_sharded else 0
        return state_bytes(self.weight_count, sharded)

    @property
    def _language_model_bytes(self) -> int:
        prefix = self.checkpoint.config.family.language_model
        return spec_bytes(select_prefix(self.checkpoint.layout, prefix))


def plan_distillation(
    settings: Distill,
    samples: Callable[[Skipped], Iterator[Sample]],
    skipped: Skipped,
    checkpoint: Checkpoint,
    policy: Policy,
    video: Video,
    directory: Path,
    processes: Processes,
    device: str,
    record: Callable[[int], None],
) -> DistillationPlan:
    """Check a distillation against its model, its processes and its disk.

    Args:
        settings: The recipe's section.
        samples: As in `DistillationPlan`.
        skipped: As in `DistillationPlan`.
        checkpoint: The BF16 checkpoint.
        policy: Format by linear.
        video: How clips are sampled; its rate is the default of the settings' rates.
        directory: Where checkpoints will be kept while it runs.
        processes: The processes that will train.
        device: A torch device.
        record: As in `DistillationPlan`.

    Raises:
        BadInput: With every fault: no linear to train, a batch that the processes cannot share, a
            device that the trainer would not use, a launcher that would empty the weights, or a
            disk too small for the checkpoints.
    """
    plan = DistillationPlan(
        settings=settings,
        trained=_trained(settings.train, checkpoint, policy),
        directory=directory,
        samples=samples,
        skipped=skipped,
        checkpoint=checkpoint,
        policy=policy,
        video=video,
        processes=processes,
        device=device,
        record=record,
        is_sharded=parse_flag_from_env(_FSDP),
    )
    raise_if_any(_faults(plan))
    return plan


def _trained(chosen: str, checkpoint: Checkpoint, policy: Policy) -> tuple[str, ...]:
    """Return the tensors of the language model that `distill.train` chooses."""
    if chosen == "all":
        return tuple(select_prefix(checkpoint.layout, checkpoint.config.family.language_model))
    pattern = "*" if chosen == "linears" else chosen
    names = []
    for name in policy.quantized:
        short = name.rpartition(".")[2]
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(short, pattern):
            names.append(f"{name}.weight")
    return tuple(names)


def _faults(plan: DistillationPlan) -> Iterator[Fault]:
    settings = plan.settings
    count = plan.processes.count
    if not plan.trained:
        short = sorted({name.rpartition(".")[2] for name in plan.policy.quantized})
        what = f"{settings.train!r} matches no quantized linear"
        yield Fault("distill.train", what, f"choose all, linears or {', '.join(short)}")
    if settings.batch % count:
        what = f"{settings.batch} is not a multiple of {count} processes"
        yield Fault("distill.batch", what, "change either")
    longest = min(settings.max_length, plan.checkpoint.config.max_length)
    if settings.pack_length is not None and settings.pack_length < longest:
        what = f"a row of {settings.pack_length} tokens has no room for a sample of {longest}"
        yield Fault("distill.pack_length", what, "raise it, or lower distill.max_length")
    if count == 1 and plan.device not in ("cpu", "cuda", "cuda:0"):
        what = f"{plan.device!r}: training takes the first GPU"
        yield Fault("device", what, "set CUDA_VISIBLE_DEVICES instead")
    if parse_flag_from_env(_FSDP_EMPTY_WEIGHTS):
        # Trap: transformers then loads empty tensors on every process but the first, and each
        # process calibrates its own noise.
        what = "cpu_ram_efficient_loading leaves processes without weights"
        remedy = "launch with --fsdp_cpu_ram_efficient_loading false"
        yield Fault("accelerate", what, remedy)
    yield from space_faults(plan.directory, plan.state_bytes, " for checkpoints of the training")


def training_bytes(
    model: int, weights: int, is_taught: bool, shards: int, activations: int = 0
) -> int:
    """Bytes of device memory that one process needs for training.

    Args:
        model: Bytes of the language model in BF16.
        weights: Number of weights that train: each is float32 instead of BF16, and has a gradient
            and AdamW's two moments.
        is_taught: Whether there is a teacher besides.
        shards: Processes that FSDP divides both models among; each holds them whole at first.
        activations: Bytes that a sample needs besides; see `activation_bytes`.
    """
    models = 2 if is_taught else 1
    # Loaded in BF16, then the student's in float32; gradients and moments come with the training.
    loaded = model * models + (_FLOAT32 - _BF16) * weights
    training = loaded + (_FLOAT32 + _MOMENTS) * weights
    return max(loaded, training // shards + activations)


def gathered_bytes(checkpoint: Checkpoint, trained: Collection[str], is_taught: bool) -> int:
    """Bytes that a process of a sharded training holds whole: embeddings, final norm and output
    layer of both models during a whole step, and the largest layer, the next one and a gradient.

    Args:
        checkpoint: The BF16 checkpoint.
        trained: Names of the tensors that train; they are gathered in float32.
        is_taught: Whether there is a teacher besides.
    """
    family = checkpoint.config.family
    layers: dict[int | None, int] = {}
    teachers = 0
    for name, spec in select_prefix(checkpoint.layout, family.language_model).items():
        layer = family.layer_of(name)
        size = math.prod(spec.shape) * (_FLOAT32 if name in trained else _BF16)
        layers[layer] = layers.get(layer, 0) + size
        if layer is None and is_taught:
            teachers += math.prod(spec.shape) * _BF16
    outside = layers.pop(None)
    return outside + teachers + 3 * max(layers.values())


def activation_bytes(
    config: CheckpointConfig,
    tokens: int,
    gradient_checkpointing: bool,
    is_plain: bool = False,
) -> int:
    """Bytes of device memory that one row's forward and backward need beside the weights.

    With checkpointed layers: the residual stream before every layer, the inside of one layer, and
    the logits of one piece of the loss. Without: the inside of every layer. Counted by tensors of
    the widest size; two H100s have measured what a token adds, and the peak within 10% of the plan
    (benchmarks/results/training_12b_2gpu.json, tests/quantize/distill/test_distill_plan.py). The
    scan in plain PyTorch needs far more than mamba_ssm's kernels, which keep little of it.

    Args:
        config: The model's.
        tokens: Of the row.
        gradient_checkpointing: Whether each layer is computed twice.
        is_plain: Whether Mamba layers run in plain PyTorch, without mamba_ssm's kernels.
    """
    stream = config.depth * config.hidden_size * _BF16
    inside = {kind: _inside_bytes(config, kind, is_plain) for kind in config.family.mixers.values()}
    if gradient_checkpointing:
        layers = max(inside.values())
    else:
        layers = sum(inside[config.mixer_kind(layer)] for layer in range(config.depth))
    loss = _LOSS_TENSORS * min(tokens, POSITIONS) * config.text["vocab_size"] * _FLOAT32
    return tokens * (stream + layers) + loss


def _inside_bytes(config: CheckpointConfig, kind: str, is_plain: bool) -> int:
    """Bytes of a token inside a layer, for its backward."""
    text = config.text
    widths = {
        "mlp": text["intermediate_size"],
        "mamba": text["mamba_num_heads"] * text["mamba_head_dim"],
        "attention": text["num_attention_heads"] * text["head_dim"],
    }
    size = _TENSORS_INSIDE * widths[kind] * _BF16
    if kind == "mamba" and is_plain:
        width = text["mamba_num_heads"] * (text["ssm_state_size"] + text["chunk_size"])
        size += _SCAN_TENSORS * width * _FLOAT32
    return size


def state_bytes(weights: int, sharded: int = 0) -> int:
    """Bytes on disk while a checkpoint is written beside the one before it.

    Args:
        weights: Number of weights that train. A checkpoint contains them and AdamW's two moments
            in float32; the best weights are kept apart.
        sharded: Bytes of the BF16 language model where FSDP divides it among processes: its
            checkpoints contain all of it as well, the trained weights in float32.
    """
    checkpoint = (_FLOAT32 + _MOMENTS) * weights
    if sharded:
        checkpoint += sharded + (_FLOAT32 - _BF16) * weights
    best = _FLOAT32 * weights
    return 2 * checkpoint + best
