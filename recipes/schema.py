"""What a recipe may say: each field's type, range and default; an unknown key is an error that
names the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from checkpoint.faults import BadInput, Fault, nearest, raise_if_any
from tiny.tasks import TASKS

Rate = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SyntheticSource(_Section):
    """Documents, tables, charts, clips and texts drawn from a seed."""

    type: Literal["synthetic"]
    weight: Annotated[float, Field(gt=0)] = 1.0
    kinds: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Share of each kind; all kinds alike by default."""


class JsonlSource(_Section):
    """A JSON Lines file of OpenAI chat messages with local images and videos."""

    type: Literal["jsonl"]
    path: Path
    weight: Annotated[float, Field(gt=0)] = 1.0


class HubSource(_Section):
    """A Hugging Face dataset by name, streamed, or a local dataset directory."""

    type: Literal["hub"]
    name: str
    split: str = "train"
    subset: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0


Source = Annotated[SyntheticSource | JsonlSource | HubSource, Field(discriminator="type")]
_DEFAULT_SOURCES: tuple[Source, ...] = (SyntheticSource(type="synthetic"),)


class Calibrate(_Section):
    """What the activation ranges are taken from."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)] = _DEFAULT_SOURCES
    samples: Annotated[int, Field(ge=1)] = 1024
    seed: int = 0
    max_length: Annotated[int, Field(ge=16)] = 16384
    """Longest prompt in tokens, after EVS; longer samples are skipped."""
    video_pruning_rate: Rate = 0.75
    """EVS rate of the clips: give what serving will use."""
    max_skipped: Annotated[int, Field(ge=0)] = 0
    """Bad samples to skip and count before the run stops."""


class LayerRule(_Section):
    """One rule of the layer policy; what is not given matches everything, the last rule that
    matches wins.
    """

    format: str
    kind: str | None = None
    layers: tuple[int, ...] | None = None
    name: str | None = None


class Auto(_Section):
    """Which of several formats each linear gets, by ModelOpt's `auto_quantize`.

    Searched are the linears that `quantize.layers` quantizes; what it leaves in bf16 stays so.
    """

    bits: Annotated[float, Field(ge=4, lt=16)] = 6.0
    """Mean bits a weight of the searched linears, at most: NVFP4 has 4.5 with its block scales, FP8
    8.
    """
    formats: Annotated[tuple[Literal["nvfp4", "fp8"], ...], Field(min_length=1)] = ("nvfp4", "fp8")
    """What a linear may become, besides bf16."""
    samples: Annotated[int, Field(ge=1)] = 8
    """Calibration samples to score on; each is run once a linear and format."""


class Quantize(_Section):
    """Which layer gets which format, and how its ranges are found."""

    layers: Annotated[tuple[LayerRule, ...], Field(min_length=1)]
    kv_cache: Literal["fp8"] | None = None
    algorithm: Literal["max", "mse", "local_hessian", "awq_clip", "gptq"] = "max"
    """ModelOpt's calibration algorithm; `quantize/algorithms.py` says what each does, and for which
    formats.
    """
    gptq_damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Added to GPTQ's Hessian, as a share of its mean diagonal: more of it moves weights less."""
    auto: Auto | None = None
    """Without it, every linear has the format that `layers` gives it."""

    memory: Literal["auto", "whole", "stream"] = "auto"
    """`whole` holds the model in the device's memory, `stream` one layer at a time; `auto` asks the
    device.
    """
    batch_tokens: Annotated[int, Field(ge=1)] = 8192
    """Samples of one length run together up to so many tokens, where that changes no bit."""
    host_memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Activations that `stream` keeps in host memory, in 1e9 bytes; what is beyond goes to a file
    beside the output.
    """

    @field_validator("algorithm", mode="before")
    @classmethod
    def _loadable(cls, name: Any) -> Any:
        if name in ("awq", "awq_lite", "awq_full", "smoothquant", "svdquant"):
            raise ValueError(
                "vLLM cannot load its pre_quant_scale; awq_clip is the part of AWQ that it can"
            )
        return name


class Distill(_Section):
    """Distillation of the quantized model from BF16; the defaults are the published run of the 12B.

    Sources: arXiv 2511.03929 (batch, steps, optimizer, warm-up, loss over prompt tokens too) and
        arXiv 2601.20088,
    Table 7 (learning rate).
    """

    sources: Annotated[tuple[Source, ...], Field(min_length=1)] = _DEFAULT_SOURCES
    loss: Literal["kl", "cross_entropy"] = "kl"
    """`kl` from BF16's next-token distributions, or the samples' own tokens: QAT, for comparison.
    """
    steps: Annotated[int, Field(ge=1)] = 240
    """Optimizer steps."""
    batch: Annotated[int, Field(ge=1)] = 128
    """Samples a step, over all processes; they run one by one and are accumulated."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-6
    """At its peak: a tenth of fine-tuning's."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps over which the rate rises; then it falls as a cosine."""
    train: str = "*"
    """Which quantized linears train: a shell pattern on the full name or its last part."""
    video_pruning_rates: Annotated[tuple[Rate, ...], Field(min_length=1)] = (0.75,)
    """EVS rates of the clips: one for a fixed rate; of several, each sample draws one."""
    max_length: Annotated[int, Field(ge=16)] = 16384
    max_skipped: Annotated[int, Field(ge=0)] = 0
    held_out: Annotated[int, Field(ge=1)] = 32
    """Samples kept apart from the sources, by the loss of whose answers the best step is chosen."""
    save_every: Annotated[int, Field(ge=1)] = 20
    """Steps between two checkpoints, each with an evaluation."""
    patience: Annotated[int, Field(ge=1)] = 4
    """Evaluations in a row worse than PTQ after which the run stops."""
    gradient_checkpointing: bool = False
    """Compute each layer twice rather than keep its activations."""
    seed: int = 2_000_003
    """A third seed, so that synthetic samples are neither calibration's nor accuracy's."""

    @property
    def samples(self) -> int:
        """Samples one pass needs."""
        return self.held_out + self.steps * self.batch


class Tasks(_Section):
    """Exact tasks that BF16 and the result both answer."""

    names: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(TASKS)
    items: Annotated[int, Field(ge=1)] = 100
    max_loss: Annotated[float, Field(ge=0)] | None = None
    """Points that the result may be below BF16, on the mean over the tasks."""

    @field_validator("names")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in TASKS]
        if unknown:
            raise ValueError(f"unknown task {unknown[0]!r}: {nearest(unknown[0], TASKS)}")
        return names


class Accuracy(_Section):
    """What is measured against BF16 before a checkpoint counts as done, and what is demanded."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)] = _DEFAULT_SOURCES
    samples: Annotated[int, Field(ge=1)] = 64
    seed: int = 1_000_003
    """Another seed than calibration's, so that the samples are held out."""
    max_kl: Annotated[float, Field(gt=0)] | None = None
    min_top1: Annotated[float, Field(ge=0, le=1)] | None = None
    max_perplexity_ratio: Annotated[float, Field(gt=0)] | None = None
    tasks: Tasks | None = None
    """`accuracy/tasks.py`: six tasks with one right answer each, which the tiny checkpoint was
    trained for.
    """


class Serve(_Section):
    """How `python -m serve` starts vLLM on the result."""

    video_pruning_rate: Rate = 0.75
    max_model_len: Annotated[int, Field(ge=256)] | None = None


class Recipe(_Section):
    """One product: what to load, calibrate, quantize, demand and serve."""

    model: str
    """Directory of the BF16 checkpoint, or `tiny` for the tiny one that comes with this repository.
    """
    output: Path
    device: str | None = None
    """A torch device; the GPU if there is one by default."""
    calibrate: Calibrate = Calibrate()
    quantize: Quantize
    distill: Distill | None = None
    """Without it, a recipe is PTQ."""
    accuracy: Accuracy = Accuracy()
    serve: Serve = Serve()


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides by dotted name.

    Raises:
        BadInput: With every fault: no such file, not YAML, unknown or misspelt keys, wrong types,
            out of range.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        shipped = sorted(
            str(p.relative_to(Path.cwd())) if p.is_relative_to(Path.cwd()) else str(p)
            for p in _shipped()
        )
        raise BadInput(Fault(str(path), "no such recipe", nearest(str(path), shipped))) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(
            Fault(str(path), f"cannot be read as YAML: {_one_line(error)}", "mend the file")
        ) from None
    if not isinstance(raw, dict):
        raise BadInput(
            Fault(str(path), "holds no mapping of fields", "start from recipes/tiny/fp8.yaml")
        )
    raise_if_any([fault for text in overrides for fault in _override(raw, text)])
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise BadInput(*(_fault(path, detail) for detail in error.errors())) from None


def _shipped() -> list[Path]:
    return list(Path(__file__).parent.rglob("*.yaml"))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _override(raw: dict[str, Any], text: str) -> list[Fault]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        return [Fault(text, "is no recipe and no key=value", "for example calibrate.samples=64")]
    *parents, last = key.split(".")
    section: Any = raw
    for parent in parents:
        if isinstance(section, list) and parent.isdigit() and int(parent) < len(section):
            section = section[int(parent)]
        elif isinstance(section, dict):
            if section.get(parent) is None:  # left out, or null
                section[parent] = {}
            section = section[parent]
        else:
            return [
                Fault(
                    text, f"{parent} is no section of the recipe", "write the field's dotted name"
                )
            ]
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        return [Fault(text, f"the value is no YAML: {_one_line(error)}", "quote it")]
    if isinstance(section, list) and last.isdigit() and int(last) < len(section):
        section[int(last)] = parsed
    elif isinstance(section, dict):
        section[last] = parsed
    else:
        return [Fault(text, f"{last} is no field there", "write the field's dotted name")]
    return []


def _fault(path: Path, detail: Any) -> Fault:
    """A pydantic error as field, value, what is allowed, what to do."""
    location = [part for part in detail["loc"] if part not in ("synthetic", "jsonl", "hub")]
    where = f"{path}: {'.'.join(map(str, location)) or 'recipe'}"
    if detail["type"] == "extra_forbidden":
        valid = _fields_at(detail["loc"][:-1])
        return Fault(
            where, "unknown field", nearest(str(location[-1]), valid) if valid else "remove it"
        )
    if detail["type"] == "missing":
        return Fault(where, "is missing", "add it")
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return Fault(where, f"{detail['input']!r:.80}: {message}", "mend the recipe or the override")


def _fields_at(location: Sequence[Any]) -> list[str]:
    """Names of the fields of the section at a pydantic error location."""
    by_tag: dict[Any, Any] = {"synthetic": SyntheticSource, "jsonl": JsonlSource, "hub": HubSource}
    model: Any = Recipe
    for part in location:
        if part in by_tag:
            model = by_tag[part]
        elif part == "layers":
            model = LayerRule
        elif isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            for choice in (
                annotation,
                *get_args(annotation),
            ):  # a section, or one that may be left out
                if isinstance(choice, type) and issubclass(choice, BaseModel):
                    model = choice
    return list(model.model_fields)
