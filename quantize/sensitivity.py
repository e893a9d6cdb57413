"""How much quality each linear layer loses in each format, and the mix of formats that fits a size:
ModelOpt's `auto_quantize`.

One scoring gives the mix for every size: `mtq.get_auto_quantize_config` solves again without
running the model. ModelOpt groups q, k and v, as vLLM's fused layer needs, and may leave a layer in
BF16; vLLM loads every such mix as MIXED_PRECISION.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.algorithms import QuantRecipe
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from torch import nn

from calibrate.forward import Embedded
from checkpoint.atomic import write_json
from checkpoint.faults import Fault
from quantize.formats.registry import FORMATS, INPUT_QUANTIZER, UNQUANTIZED, WEIGHT_QUANTIZER
from quantize.modelopt_output import printed_to_log
from quantize.policy import Policy
from quantize.settings import Auto

SENSITIVITY = "sensitivity.json"
POSITIONS = 512
"""Last positions of a sample whose distributions are compared: 0.27 GB of logits at the 12B's
vocabulary.
"""
_BF16_BITS = 16.0


@dataclass(frozen=True)
class Score:
    """What one format does to one linear.

    Attributes:
        linear: Checkpoint name without `.weight`.
        format: A key of `FORMATS`.
        kl: KL(BF16 ‖ model with only this linear's group in the format), in nats, summed over the
            compared positions; q, k and v are one group and share it. ModelOpt lowers it where a
            smaller format has less.
        weight_mse: Mean squared error of the weight.
        input_mse: Mean squared error of the inputs of the samples, with every linear in the format;
            0 for a weight-only format.
    """

    linear: str
    format: str
    kl: float
    weight_mse: float
    input_mse: float


@dataclass(frozen=True)
class Point:
    """One mix of formats.

    Attributes:
        bits: Mean bits per weight of the searched linears.
        kl: Sum of the KL of its groups, in nats.
        formats: Number of linears by format.
    """

    bits: float
    kl: float
    formats: dict[str, int]


@dataclass(frozen=True)
class Search:
    """The result of a scoring.

    Attributes:
        policy: The chosen mix.
        chosen: Its point.
        curve: Error against bits, fewest bits first.
        scores: By linear and format.
    """

    policy: Policy
    chosen: Point
    curve: tuple[Point, ...]
    scores: tuple[Score, ...]

    def __str__(self) -> str:
        mix = ", ".join(f"{count} {format}" for format, count in self.chosen.formats.items())
        size = f"{self.chosen.bits:.2f} bits per weight"
        return f"{size}, sum of KL {self.chosen.kl:.5f} nats: {mix}"

    def write(self, directory: Path) -> None:
        """Write `sensitivity.json` into the exported directory."""
        found = dataclasses.asdict(self)
        del found["policy"]
        write_json(directory / SENSITIVITY, found)


def format_bits(format: str) -> float:
    """Bits per weight of a format, block scales included: 8 for FP8, 4.5 for NVFP4."""
    return FORMATS[format].bits


def search_faults(auto: Auto | None, distils: bool) -> Iterator[Fault]:
    """Yield what is wrong with a search, before any weight is loaded.

    Args:
        auto: The recipe's section; None for a recipe without a search.
        distils: Whether a distillation follows.
    """
    if auto is None:
        return
    smallest = min(auto.formats, key=format_bits)
    if auto.bits < format_bits(smallest):
        needed = f"{smallest}'s {format_bits(smallest):g}"
        what = f"{auto.bits:g} bits per weight are less than {needed}"
        yield Fault("quantize.auto.bits", what, "raise it, or add a smaller format")
    if distils:
        what = "a distillation must know its formats when it is resumed"
        remedy = "run without distill, then write the mix into quantize.layers"
        yield Fault("quantize.auto", what, remedy)


def search_formats(
    language_model: nn.Module,
    policy: Policy,
    given: Sequence[Embedded],
    formats: Sequence[str],
    bits: float,
) -> Search:
    """Score the linears of a policy in each format and choose the mix of least error under a size.

    Args:
        language_model: BF16 `NemotronHForCausalLM`; it cannot be used afterwards.
        policy: What it quantizes is searched; what it leaves in BF16 stays so.
        given: Samples; each runs once per group of linears and format, besides a calibration.
        formats: What a linear may become, besides BF16; no two of the same size.
        bits: Mean bits per weight of the searched linears, at most; no less than the smallest
            format's.
    """
    language_model.eval()
    device = next(language_model.parameters()).device.type
    state = _score(language_model, policy, given, formats, bits, device)
    candidates = _Candidates(formats, device)
    groups = _searched_groups(state, policy, candidates)
    chosen, mixed = _mix(state, groups, candidates, policy, bits)
    curve = {chosen.bits: chosen}
    for size in _sizes(formats):
        point, _ = _mix(state, groups, candidates, policy, size)
        curve.setdefault(point.bits, point)
    by_size = sorted(curve.values(), key=lambda point: point.bits)
    scores = _scores(language_model, policy, given, formats, groups, device)
    return Search(policy=mixed, chosen=chosen, curve=tuple(by_size), scores=tuple(scores))


@dataclass(frozen=True)
class _Group:
    """Linears that get one format.

    Attributes:
        linears: Their checkpoint names.
        weights: Their number of weights, in ModelOpt's units of cost.
        kl: KL by format.
    """

    linears: tuple[str, ...]
    weights: float
    kl: Mapping[str, float]


class _Candidates:
    """Tells which format a recipe or configuration of ModelOpt stands for.

    Formats are told apart by all of their quantizer settings, not by their size or bits: NVFP4 and
    weight-only NVFP4 differ in neither.
    """

    def __init__(self, formats: Sequence[str], device: str) -> None:
        self._by_recipe: dict[QuantRecipe, str] = {}
        self._settings: dict[str, dict[str, QuantizerAttributeConfig]] = {}
        for format in formats:
            self._by_recipe[QuantRecipe(_format_config(format, device), name=format)] = format
            self._settings[format] = {}
            for quantizer in FORMATS[format].quantizers:
                settings = FORMATS[format].quantizer_settings(quantizer, device)
                self._settings[format][quantizer] = QuantizerAttributeConfig(**settings)

    def of_recipe(self, recipe: QuantRecipe) -> str | None:
        """The format of a candidate of the search; None for the one that quantizes nothing."""
        return self._by_recipe.get(recipe)

    def by_module(self, config: Mapping[str, Any]) -> dict[str, str]:
        """The format of every module that a configuration of `mtq.quantize` quantizes."""
        enabled: dict[str, dict[str, QuantizerAttributeConfig]] = {}
        for entry in config["quant_cfg"]:
            module, _, quantizer = entry["quantizer_name"].rpartition(".")
            if quantizer in (WEIGHT_QUANTIZER, INPUT_QUANTIZER) and entry["enable"]:
                found = enabled.setdefault(module, {})
                found[quantizer] = QuantizerAttributeConfig(**entry["cfg"])
        return {module: self._format_with(found) for module, found in enabled.items()}

    def _format_with(self, quantizers: Mapping[str, QuantizerAttributeConfig]) -> str:
        for format, own in self._settings.items():
            if own == quantizers:
                return format
        raise AssertionError(f"ModelOpt chose {quantizers}, which is not a candidate")


def _score(
    language_model: nn.Module,
    policy: Policy,
    given: Sequence[Embedded],
    formats: Sequence[str],
    bits: float,
    device: str,
) -> Mapping[str, Any]:
    """Run ModelOpt's search and return its state."""
    searched = {policy.family.native_module(name) for name in policy.quantized}
    others = []
    for name, module in language_model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d) and name not in searched:
            others.append(name)
    with _quiet_modelopt():
        _, state = mtq.auto_quantize(
            language_model,
            constraints={"effective_bits": bits, "cost": {"excluded_module_name_patterns": others}},
            quantization_formats=[_format_config(format, device) for format in formats],
            data_loader=given,
            forward_step=_logits,
            disabled_layers=others,
            num_calib_steps=len(given),
            num_score_steps=len(given),
            method="kl_div",
        )
    return state


@contextlib.contextmanager
def _quiet_modelopt() -> Iterator[None]:
    """Log ModelOpt's output, and ignore two of its warnings.

    They say that formats given in full have no name, and that the algorithm is `max`.
    """
    message = "Received custom quantization formats|get_auto_quantize_config"
    with printed_to_log(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=message)
        yield


def _format_config(format: str, device: str) -> dict[str, Any]:
    """ModelOpt's configuration that gives all linears one format."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for quantizer in FORMATS[format].quantizers:
        settings = FORMATS[format].quantizer_settings(quantizer, device)
        entries.append({"quantizer_name": f"*{quantizer}", "cfg": settings, "enable": True})
    return {"quant_cfg": entries, "algorithm": "max", "effective_bits": FORMATS[format].bits}


def _logits(language_model: nn.Module, sample: Embedded) -> torch.Tensor:
    """Logits [1, positions, vocabulary] of the sample's last positions."""
    inputs = sample.inputs_embeds[None].to(next(language_model.parameters()).device)
    output = language_model(inputs_embeds=inputs, use_cache=False, logits_to_keep=POSITIONS)
    logits: torch.Tensor = output.logits
    return logits


def _searched_groups(
    state: Mapping[str, Any], policy: Policy, candidates: _Candidates
) -> list[_Group]:
    """The groups of ModelOpt's search that contain linears of the policy."""
    names = {policy.family.native_module(name): name for name in policy.quantized}
    groups = []
    for stats in state["candidate_stats"].values():
        modules = stats["module_names"]
        if modules[0] not in names:
            continue
        kl = {}
        for recipe, score in zip(stats["formats"], stats["scores"], strict=True):
            format = candidates.of_recipe(recipe)
            if format is not None:
                kl[format] = float(score)
        linears = tuple(names[module] for module in modules)
        groups.append(_Group(linears, stats["uncompressed_cost"], kl))
    return groups


def _sizes(formats: Sequence[str]) -> list[float]:
    """Bits per weight from the smallest format's to BF16's, in steps of one half."""
    smallest = min(FORMATS[format].bits for format in formats)
    steps = int(2 * (_BF16_BITS - smallest))
    return [smallest + step / 2 for step in range(steps + 1)]


def _mix(
    state: Mapping[str, Any],
    groups: Sequence[_Group],
    candidates: _Candidates,
    policy: Policy,
    bits: float,
) -> tuple[Point, Policy]:
    """ModelOpt's solution for a size, without running the model, and the policy that it means."""
    with _quiet_modelopt():
        config = mtq.get_auto_quantize_config(state, {"effective_bits": bits})
    chosen = candidates.by_module(config)
    weights = 0.0
    size = 0.0
    kl = 0.0
    for group in groups:
        format = chosen.get(policy.family.native_module(group.linears[0]))
        weights += group.weights
        if format is None:
            size += group.weights * _BF16_BITS
        else:
            size += group.weights * FORMATS[format].bits
            kl += group.kl[format]
    formats = {}
    for name in policy.formats:
        formats[name] = chosen.get(policy.family.native_module(name), UNQUANTIZED)
    mixed = dataclasses.replace(policy, formats=formats)
    return Point(round(size / weights, 3), kl, mixed.counts()), mixed


def _scores(
    language_model: nn.Module,
    policy: Policy,
    given: Sequence[Embedded],
    formats: Sequence[str],
    groups: Sequence[_Group],
    device: str,
) -> Iterator[Score]:
    """The scores of every linear, in the order of the policy."""
    kl: dict[str, Mapping[str, float]] = {}
    for group in groups:
        kl.update(dict.fromkeys(group.linears, group.kl))
    errors = {}
    for format in formats:
        errors[format] = _squared_errors(language_model, policy, given, format, device)
    for name in policy.quantized:
        module = policy.family.native_module(name)
        for format in formats:
            weight_mse = errors[format][f"{module}.{WEIGHT_QUANTIZER}"]
            input_mse = 0.0
            if INPUT_QUANTIZER in FORMATS[format].quantizers:
                input_mse = errors[format][f"{module}.{INPUT_QUANTIZER}"]
            yield Score(name, format, kl[name][format], weight_mse, input_mse)


def _squared_errors(
    language_model: nn.Module, policy: Policy, given: Sequence[Embedded], format: str, device: str
) -> dict[str, float]:
    """Mean squared error by quantizer, with every linear of the policy in one format."""
    config = _format_config(format, device)
    disabled, *enabled = config["quant_cfg"]
    entries = [disabled]
    for name in policy.quantized:
        for entry in enabled:
            quantizer = entry["quantizer_name"].removeprefix("*")
            full_name = f"{policy.family.native_module(name)}.{quantizer}"
            entries.append({**entry, "quantizer_name": full_name})

    @torch.no_grad()
    def run_samples(model: nn.Module) -> None:
        for sample in given:
            _logits(model, sample)

    with _quiet_modelopt():
        mtq.quantize(language_model, {"quant_cfg": entries, "algorithm": "max"}, run_samples)
        errors: dict[str, float] = mtq.compute_quantization_mse(language_model, run_samples)
    return errors
