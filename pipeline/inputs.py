"""What a recipe names, opened: the checkpoint, the device, the samples as prompts, the versions of
the packages.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from calibrate.prompts import Prompt, build_prompts
from calibrate.samples import Sample, Skipped
from calibrate.sources.hub import read_hub
from calibrate.sources.jsonl import read_jsonl
from calibrate.sources.mixing import mixed, shuffled
from calibrate.sources.synthetic.kinds import MIXED, synthetic
from checkpoint.config import CheckpointConfig, read_config
from checkpoint.faults import BadInput, Fault
from quantize.distill.distillation import Plan, Settings, plan_distillation
from quantize.distill.state import stamp
from quantize.policy import Policy
from recipes.schema import (
    Accuracy,
    Calibrate,
    Distill,
    HubSource,
    JsonlSource,
    Recipe,
    Source,
    SyntheticSource,
)
from tiny.checkpoint import tiny_checkpoint

TINY = "tiny"
_PACKAGES = ("nvidia-modelopt", "torch", "transformers", "safetensors", "datasets", "hybridquant")


def open_checkpoint(recipe: Recipe) -> CheckpointConfig:
    """The recipe's BF16 checkpoint; `tiny` is written beside the output when it is not there yet.
    """
    if recipe.model == TINY:
        return tiny_checkpoint(recipe.output.absolute().parent / "tiny-bf16")
    config = read_config(recipe.model)
    if "quantization_config" in config.raw:
        raise BadInput(Fault(recipe.model, "is quantized already", "give the BF16 checkpoint"))
    return config


def pick_device(name: str | None) -> str:
    """The named device, or the GPU where there is one.

    Raises:
        BadInput: When torch has no such device.
    """
    if name is None:
        if (
            "LOCAL_RANK" in os.environ and torch.cuda.is_available()
        ):  # one of several under accelerate launch
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            return f"cuda:{os.environ['LOCAL_RANK']}"
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(
            Fault("device", f"{name!r}: {reason}", "give cpu, cuda or cuda:N, or leave it out")
        ) from None
    return name


def prompt_stream(
    section: Calibrate | Accuracy,
    config: CheckpointConfig,
    tokenizer: PreTrainedTokenizerFast,
    skipped: Skipped,
    pruning_rate: float,
    max_length: int | None = None,
) -> Iterator[Prompt]:
    """The section's samples as prompts, built as they are asked for; the first is built at once.

    Raises:
        BadInput: At once for a source that is not there, is empty or begins with a sample that
            cannot be used; later when more samples are bad than `skipped` allows.
    """
    parts = [(_read(source, section, skipped), source.weight) for source in section.sources]
    name = f"{type(section).__name__.lower()}.sources"
    prompts = build_prompts(
        mixed(parts, seed=section.seed, name=name),
        config,
        tokenizer,
        count=section.samples,
        skipped=skipped,
        max_length=min(max_length or config.max_length, config.max_length),
        pruning_rate=pruning_rate,
        name=name,
    )
    return itertools.chain([next(prompts)], prompts)


def distillation(
    recipe: Recipe,
    config: CheckpointConfig,
    policy: Policy,
    tokenizer: PreTrainedTokenizerFast,
    device: str,
) -> Plan | None:
    """The recipe's distillation, checked; None for a recipe without one.

    Raises:
        BadInput: As `quantize.distill.plan_distillation`, and for a source that is not there or is
            empty.
    """
    section = recipe.distill
    if section is None:
        return None

    def in_order() -> Iterator[Sample]:
        skipped = Skipped(section.max_skipped)
        parts = [(_read(source, section, skipped), source.weight) for source in section.sources]
        return mixed(parts, seed=section.seed, name="distill.sources")

    def samples() -> Iterator[Sample]:
        return shuffled(in_order(), section.seed)

    next(in_order())
    decides = recipe.model_dump(mode="json", include={"model", "calibrate", "quantize", "distill"})
    files = [
        source.path
        for source in (*recipe.calibrate.sources, *section.sources)
        if isinstance(source, JsonlSource)
    ]
    decides |= {"versions": versions(), "samples": {str(path): stamp(Path(path)) for path in files}}
    settings = Settings(**section.model_dump(exclude={"sources"}))
    return plan_distillation(
        settings, samples, config, tokenizer, policy, recipe.output, decides, device
    )


def _read(
    source: Source, section: Calibrate | Accuracy | Distill, skipped: Skipped
) -> Iterable[Sample]:
    match source:
        case SyntheticSource():
            return synthetic(source.kinds or MIXED, section.samples, section.seed)
        case JsonlSource():
            return _begun(read_jsonl(source.path, skipped))
        case HubSource():
            return _begun(
                read_hub(source.name, split=source.split, subset=source.subset, skipped=skipped)
            )


def _begun(samples: Iterator[Sample]) -> Iterator[Sample]:
    """Take the first sample now, so that a source that is not there is found before weights are
    loaded.
    """
    return itertools.chain(list(itertools.islice(samples, 1)), samples)


def versions() -> dict[str, str]:
    """Versions of the packages that decide the result."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
