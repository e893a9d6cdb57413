"""Weights under the names that config.json requires: renamed, completed from the source.

The formats follow from the tensors here, not from config.json, whose section may be what is broken.
What the quantized tensors hold is never changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.config import CheckpointConfig
from checkpoint.family import Family
from checkpoint.faults import BadInput, Fault
from checkpoint.files import TensorFiles
from checkpoint.layout import Linear, Specs, TensorSpec, language_model_linears
from checkpoint.opened import Checkpoint
from checkpoint.other_weights import SINGLE
from checkpoint.shards import ShardWriter, plan_shards, write_index
from export.layout import formats_of, quantized_layout
from quantize.formats.registry import UNQUANTIZED

_NEW = "weights.new"
_GIVE_SOURCE = "give --source BF16_DIR"


@dataclass(frozen=True)
class Weights:
    """Where each tensor of a repaired directory comes from.

    Attributes:
        specs: Every tensor that the directory must hold.
        formats: Format of every linear by its tensors, `bf16` included.
        kv_scales: Whether attention has scales of a quantized KV cache.
        found: The name in the directory's files of each tensor that they hold.
        from_source: Tensors that are taken from the source.
        left_out: Names in the directory's files that are no tensors of this model.
    """

    specs: Specs
    formats: Mapping[str, str]
    kv_scales: bool
    found: Mapping[str, str]
    from_source: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def renamed(self) -> dict[str, str]:
        """Names that change, new by old."""
        return {old: new for new, old in self.found.items() if old != new}

    @property
    def is_sound(self) -> bool:
        """Whether the files hold what they must, under the right names, and nothing else."""
        return not (self.renamed or self.from_source or self.left_out)

    def changes(self) -> Iterator[str]:
        """Yield what is changed, a line each."""
        if self.is_sound:
            return
        yield "weights: the files are written anew, a file a layer"
        if self.renamed:
            old, new = next(iter(self.renamed.items()))
            yield f"weights: {len(self.renamed)} tensors renamed, such as {old} to {new}"
        if self.from_source:
            count = len(self.from_source)
            yield f"weights: {count} tensors taken from the source, such as {self.from_source[0]}"
        if self.left_out:
            count = len(self.left_out)
            yield f"weights: {count} tensors left out, such as {self.left_out[0]}"


def plan_weights(
    config: CheckpointConfig,
    tensors: TensorFiles,
    declared: Mapping[str, str],
    source: Checkpoint | None,
) -> Weights:
    """Find every tensor that a directory must hold.

    Args:
        config: What the repaired directory's config.json says about the model.
        tensors: The directory's weight files.
        declared: Format of linears by the directory's own config.json, for the case that two
            formats have the same tensors.
        source: The BF16 checkpoint, if given.

    Raises:
        BadInput: With each tensor that is nowhere.
    """
    family = config.family
    names: dict[str, str] = {}
    for name in tensors:
        names.setdefault(_right_name(name, family), name)
    specs = {new: tensors.specs[old] for new, old in names.items()}
    linears = language_model_linears(config)
    formats = {linear.name: _format(linear, specs, family, declared) for linear in linears}
    if all(format == UNQUANTIZED for format in formats.values()):
        what = "no linear has the tensors of a known format"
        raise BadInput(Fault(str(tensors.directory), what, "quantize again"))
    kv_scales = any(name.endswith(tuple(family.kv_linears.values())) for name in specs)
    required = quantized_layout(config, formats, kv_scales)
    for name in family.optional_tensors:
        if name in specs:
            required[name] = specs[name]
    found = {}
    from_source = []
    faults = []
    for name, spec in required.items():
        if specs.get(name) == spec:
            found[name] = names[name]
        elif source is not None and source.tensors.specs.get(name) == spec:
            from_source.append(name)
        else:
            faults.append(_missing(name, spec, specs.get(name), source, tensors.directory))
    if faults:
        raise BadInput(*faults)
    left_out = tuple(name for name in tensors if name not in set(found.values()))
    return Weights(required, formats, kv_scales, found, tuple(from_source), left_out)


def write_weights(
    weights: Weights,
    config: CheckpointConfig,
    tensors: TensorFiles,
    source: Checkpoint | None,
    target: Path,
) -> None:
    """Rewrite the weight files and the index, one file per layer; sound ones are left alone.

    Args:
        weights: Where each tensor comes from.
        config: The repaired directory's.
        tensors: The files that are read; not those of `target`.
        source: The BF16 checkpoint, if given.
        target: The directory whose files are replaced.
    """
    if weights.is_sound:
        return

    def read(name: str) -> torch.Tensor:
        if name in weights.found:
            return tensors.read(weights.found[name])
        assert source is not None
        return source.tensors.read(name)

    shards = plan_shards(weights.specs, config.family)
    new = target / _NEW
    with ShardWriter(new, shards, read) as writer:
        for layer in range(len(shards.layers)):
            writer.put(layer, {})
    for file in {*tensors.files, SINGLE}:
        (target / file).unlink(missing_ok=True)
    for path in sorted(new.iterdir()):
        path.rename(target / path.name)
    shutil.rmtree(new)
    write_index(shards, target)


def _right_name(name: str, family: Family) -> str:
    """The checkpoint's name of a tensor that an exporter wrote under transformers' names.

    ModelOpt's exporter writes `backbone.…` and `lm_head.…` for the language model alone,
    `language_model.model.…` for transformers' class of the whole model, and with transformers 5.14
    `embedding` instead of `embeddings`.
    """
    if name.startswith(family.language_model):
        name = name.removeprefix(family.language_model)
        prefix = family.language_model
    elif name.startswith((family.vision, family.projector)):
        return name
    else:
        prefix = ""
    inner = family.backbone.removeprefix(family.language_model)
    for own in (inner, family.native_backbone):
        if name.startswith(own):
            name = family.backbone + name.removeprefix(own)
            return _embeddings_renamed(name, family)
    if name.startswith(family.lm_head.removeprefix(family.language_model)):
        return family.language_model + name
    return prefix + name


def _embeddings_renamed(name: str, family: Family) -> str:
    singular = f"{family.embeddings.removesuffix('s')}."
    if name.startswith(singular):
        return f"{family.embeddings}.{name.removeprefix(singular)}"
    return name


def _format(linear: Linear, specs: Specs, family: Family, declared: Mapping[str, str]) -> str:
    """The format whose tensors are those of a linear; `bf16` where none fits."""
    fitting = formats_of(linear, specs, family)
    if declared.get(linear.name) in fitting:
        return declared[linear.name]
    return fitting[0] if fitting else UNQUANTIZED


def _missing(
    name: str,
    spec: TensorSpec,
    found: TensorSpec | None,
    source: Checkpoint | None,
    directory: Path,
) -> Fault:
    what = f"tensor {name} is missing"
    if found is not None:
        what = f"tensor {name} is {found.dtype} {list(found.shape)}, "
        what += f"not {spec.dtype} {list(spec.shape)}"
    remedy = _GIVE_SOURCE if source is None else "quantize again: the source cannot replace it"
    return Fault(str(directory), what, remedy)
