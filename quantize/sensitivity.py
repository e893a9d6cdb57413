"""How much each linear layer minds each format, and the mix of formats that fits a size: ModelOpt's
`auto_quantize`.

One scoring gives the mix for every size: `mtq.get_auto_quantize_config` solves again without
running the model. ModelOpt groups q, k and v, as vLLM's fused layer needs, and may leave a layer in
BF16; all of it is what vLLM loads as MIXED_PRECISION.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import nn

from calibrate.forward import Embedded
from checkpoint.layout import spec_bytes
from checkpoint.native import module_name
from quantize.formats.registry import FORMATS, UNQUANTIZED
from quantize.policy import Policy

SENSITIVITY = "sensitivity.json"
POSITIONS = 512
"""Last positions of a sample whose distributions are compared: 0.27 GB of logits at the 12B's
vocabulary.
"""


@dataclass(frozen=True)
class Score:
    """What one format does to one linear.

    Attributes:
        linear: Checkpoint name without `.weight`.
        format: A key of `FORMATS`.
        kl: KL(BF16 ‖ model with only this linear's group in the format), in nats, summed over the
            positions compared; q, k and v are one group and share it. ModelOpt never lets it grow
            with the bits.
        weight_mse: Mean squared error of the weight.
        input_mse: Mean squared error of the inputs of the samples, every linear being in the
            format.
    """

    linear: str
    format: str
    kl: float
    weight_mse: float
    input_mse: float


@dataclass(frozen=True)
class Point:
    """One mix of formats: mean bits a weight of the searched linears, the sum of its groups' KL,
    linears by format.
    """

    bits: float
    kl: float
    formats: dict[str, int]


@dataclass(frozen=True)
class Search:
    """What a scoring found.

    Attributes:
        policy: The mix chosen.
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
        return f"{self.chosen.bits:.2f} bits a weight, sum of KL {self.chosen.kl:.5f} nats: {mix}"

    def write(self, directory: Path) -> None:
        """Write `sensitivity.json` into the exported directory."""
        found = {key: dataclasses.asdict(self)[key] for key in ("chosen", "curve", "scores")}
        partial = directory / f".{SENSITIVITY}.partial"
        partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, directory / SENSITIVITY)


def format_bits(format: str) -> float:
    """Bits a weight of a format, block scales included: 8 for FP8, 4.5 for NVFP4."""
    side = 4096
    return round(8 * spec_bytes(FORMATS[format].tensors((side, side))) / side**2, 2)


def search_formats(
    language_model: nn.Module,
    policy: Policy,
    given: Sequence[Embedded],
    formats: Sequence[str],
    bits: float,
) -> Search:
    """Score the linears of a policy in each format and choose the mix of least error under a size.

    Args:
        language_model: BF16 `NemotronHForCausalLM`; it is of no use afterwards.
        policy: What it quantizes is searched; what it leaves in BF16 stays so.
        given: Samples; each is run once a group of linears and format, besides a calibration.
        formats: What a linear may become, besides BF16.
        bits: Mean bits a weight of the searched linears, at most; no less than the smallest
            format's.
    """
    language_model.eval()
    device = next(language_model.parameters()).device.type
    names = {module_name(name): name for name in policy.quantized}
    linears = (
        name
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d)
    )
    others = [name for name in linears if name not in names]
    with _quietly():
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
    groups = [
        group for group in state["candidate_stats"].values() if group["module_names"][0] in names
    ]
    errors = _group_errors(groups, formats)
    mse = {
        format: _squared_errors(language_model, policy, given, format, device) for format in formats
    }
    scores = [
        Score(name, format, errors[module][format], *mse[format][name])
        for module, name in names.items()
        for format in formats
    ]
    smallest = min(map(format_bits, formats))
    sizes = sorted({bits, *(smallest + step / 2 for step in range(int(2 * (16 - smallest)) + 1))})
    points = {size: _mix(state, groups, errors, policy, size) for size in sizes}
    curve = {point.bits: point for point, _ in points.values()}
    chosen, found = points[bits]
    return Search(found, chosen, tuple(curve[key] for key in sorted(curve)), tuple(scores))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without ModelOpt's counts, and its warnings that formats given in full have no name and that
    all are `max`.
    """
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Received custom quantization formats|get_auto_quantize_config"
        )
        yield


def _format_config(format: str, device: str) -> dict[str, Any]:
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for quantizer in ("weight_quantizer", "input_quantizer"):
        settings = FORMATS[format].quantizer(quantizer, device)
        entries.append({"quantizer_name": f"*{quantizer}", "cfg": settings, "enable": True})
    return {"quant_cfg": entries, "algorithm": "max", "effective_bits": format_bits(format)}


def _logits(language_model: nn.Module, sample: Embedded) -> torch.Tensor:
    inputs = sample.inputs_embeds[None].to(next(language_model.parameters()).device)
    return language_model(inputs_embeds=inputs, use_cache=False, logits_to_keep=POSITIONS).logits


def _squared_errors(
    language_model: nn.Module, policy: Policy, given: Sequence[Embedded], format: str, device: str
) -> dict[str, tuple[float, float]]:
    """ModelOpt's squared error of weight and input of every linear of the policy, all of them in
    one format.
    """
    config = _format_config(format, device)
    enabled = [
        entry
        | {"quantizer_name": f"{module_name(name)}.{entry['quantizer_name'].removeprefix('*')}"}
        for name in policy.quantized
        for entry in config["quant_cfg"][1:]
    ]

    @torch.no_grad()
    def loop(model: nn.Module) -> None:
        for sample in given:
            _logits(model, sample)

    with _quietly():
        mtq.quantize(
            language_model,
            {"quant_cfg": [config["quant_cfg"][0], *enabled], "algorithm": "max"},
            loop,
        )
        errors = mtq.compute_quantization_mse(language_model, loop)
    return {
        name: (
            errors[f"{module_name(name)}.weight_quantizer"],
            errors[f"{module_name(name)}.input_quantizer"],
        )
        for name in policy.quantized
    }


def _group_errors(
    groups: Sequence[Mapping[str, Any]], formats: Sequence[str]
) -> dict[str, dict[str, float]]:
    """KL by module name and format."""
    by_bits = {format_bits(format): format for format in formats}
    return {
        module: {
            by_bits[round(16 * cost / group["uncompressed_cost"], 2)]: float(error)
            for cost, error in zip(group["costs"], group["scores"], strict=True)
            if cost < group["uncompressed_cost"]
        }
        for group in groups
        for module in group["module_names"]
    }


def _mix(
    state: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    errors: Mapping[str, Mapping[str, float]],
    policy: Policy,
    bits: float,
) -> tuple[Point, Policy]:
    """ModelOpt's solution for a size, without running the model, and the policy it is."""
    with _quietly():
        config = mtq.get_auto_quantize_config(state, {"effective_bits": bits})
    by_num_bits = {
        tuple(FORMATS[format].weight_quantizer["num_bits"]): format for format in FORMATS
    }
    chosen = {
        entry["quantizer_name"].removesuffix(".weight_quantizer"): by_num_bits[
            tuple(entry["cfg"]["num_bits"])
        ]
        for entry in config["quant_cfg"]
        if entry["quantizer_name"].endswith(".weight_quantizer") and entry["enable"]
    }
    size = error = whole = 0.0
    for group in groups:
        module, weights = group["module_names"][0], group["uncompressed_cost"]
        format = chosen.get(module, UNQUANTIZED)
        whole += weights
        size += weights * (16.0 if format == UNQUANTIZED else format_bits(format))
        error += errors[module].get(format, 0.0)
    mixed = Policy(
        {name: chosen.get(module_name(name), UNQUANTIZED) for name in policy.formats},
        policy.kv_cache,
    )
    return Point(round(size / whole, 3), error, mixed.counts()), mixed
