"""ModelOpt's calibration applied to the language model, and its quantized tensors streamed out
linear by linear.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import modelopt.torch.quantization as mtq
import torch
from torch import nn

from checkpoint.faults import BadInput, Fault, raise_if_any
from checkpoint.native import module_name
from quantize.algorithms import ALGORITHMS, modelopt_algorithm
from quantize.formats.registry import FORMATS, share_scales
from quantize.policy import Policy
from quantize.ranges import DeviceMax, WeightMax

Result = TypeVar("Result")


@dataclass(frozen=True)
class PackedLinear:
    """One linear layer in its final form.

    Attributes:
        name: Checkpoint name without `.weight`.
        format: `fp8` or `nvfp4`.
        tensors: By the suffix they get on disk, where the model is.
    """

    name: str
    format: str
    tensors: dict[str, torch.Tensor]


def modelopt_config(
    policy: Policy, algorithm: str = "max", device: str = "cpu", gptq_damping: float = 0.01
) -> dict[str, Any]:
    """The `mtq.quantize` configuration of a policy: everything off, then each linear by its full
    name.

    Full names rather than patterns, so that what ModelOpt enables is what the policy says and
    nothing besides.
    """
    searched = ALGORITHMS[algorithm].searches_blocks
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, format in policy.quantized.items():
        for quantizer in ("weight_quantizer", "input_quantizer"):
            settings = FORMATS[format].quantizer(quantizer, device, searched)
            if algorithm == "max":
                settings["calibrator"] = DeviceMax if quantizer == "input_quantizer" else WeightMax
            entries.append(
                {
                    "quantizer_name": f"{module_name(name)}.{quantizer}",
                    "cfg": settings,
                    "enable": True,
                }
            )
    if policy.kv_cache == "fp8":
        entries += [dict(entry) for entry in mtq.FP8_KV_CFG["quant_cfg"]]
    return {
        "quant_cfg": entries,
        "algorithm": modelopt_algorithm(algorithm, policy, device, gptq_damping),
    }


def quantize_model(
    language_model: nn.Module,
    policy: Policy,
    forward_loop: Callable[[], Result],
    algorithm: str = "max",
    gptq_damping: float = 0.01,
) -> Result:
    """Insert ModelOpt's quantizers into the language model and calibrate them, in place.

    Args:
        language_model: The native `NemotronHForCausalLM`, in `eval()` mode: in `train()` the fused
            Mamba path reads `out_proj.weight` directly and its quantizers see nothing.
        policy: Format by linear.
        forward_loop: Runs the language model over the calibration samples; again at every call.
        algorithm: A key of `quantize.algorithms.ALGORITHMS`.
        gptq_damping: GPTQ's.

    Returns:
        What the last forward loop returned.

    Raises:
        BadInput: When quantizers that should be enabled have no finite positive range, with their
            names.
    """
    language_model.eval()
    device = next(language_model.parameters()).device.type
    results: list[Result] = []
    try:
        # ModelOpt prints how many quantizers it inserts, and warns of each range that
        # calibration_faults will name.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*contains invalid values")
            mtq.quantize(
                language_model,
                modelopt_config(policy, algorithm, device, gptq_damping),
                lambda _: results.append(forward_loop()),
            )
    except AssertionError as error:  # how ModelOpt's calibrator meets a NaN
        if "nan" not in str(error):
            raise
        raise BadInput(_first_nan(language_model, policy)) from None
    raise_if_any(calibration_faults(language_model, policy))
    return results[-1]


def calibration_faults(language_model: nn.Module, policy: Policy) -> list[Fault]:
    """Every quantizer of the policy that is off, or whose amax is missing, zero, negative or not
    finite.
    """
    faults = []
    remedy = "did the calibration samples reach this layer, and are they and the weights finite?"
    for name in policy.quantized:
        module = language_model.get_submodule(module_name(name))
        for quantizer_name in ("weight_quantizer", "input_quantizer"):
            quantizer = getattr(module, quantizer_name, None)
            if quantizer is None or not quantizer.is_enabled:
                faults.append(
                    Fault(f"{name}.{quantizer_name}", "is not enabled", "a defect: report it")
                )
                continue
            # A static quantizer has an amax a block, which is zero where all 16 weights are.
            amax = (
                quantizer.amax
                if getattr(quantizer, "global_amax", None) is None
                else quantizer.global_amax
            )
            if amax is not None and bool(
                torch.isnan(amax).any()
            ):  # whatever lies behind it has seen NaN too
                what = "was given NaN in calibration"
                return [
                    *faults,
                    Fault(f"{name}.{quantizer_name}", what, "are the weights before it sound?"),
                ]
            if amax is None or not bool((torch.isfinite(amax) & (amax > 0)).all()):
                found = "no amax" if amax is None else f"amax {amax.flatten()[:4].tolist()}"
                faults.append(
                    Fault(f"{name}.{quantizer_name}", f"has {found} after calibration", remedy)
                )
    if policy.kv_cache:
        for name, (k_scale, v_scale) in _kv_quantizers(language_model).items():
            if k_scale is None or v_scale is None:
                faults.append(
                    Fault(name, "has no range for the KV cache after calibration", remedy)
                )
    return faults


def _first_nan(language_model: nn.Module, policy: Policy) -> Fault:
    """The first linear of the model that had seen no finite input when calibration stopped."""
    for name in policy.quantized:
        quantizer = language_model.get_submodule(module_name(name)).input_quantizer
        if quantizer.amax is None and quantizer._calibrator.compute_amax() is None:
            return Fault(
                f"{name}.input_quantizer",
                "was given NaN in calibration",
                "are the weights before it sound?",
            )
    return Fault("calibration", "met NaN", "are the weights sound?")


def packed_linears(language_model: nn.Module, policy: Policy) -> Iterator[PackedLinear]:
    """Yield every quantized linear in the model's order, packed as ModelOpt's exporter would.

    Nothing is kept: a consumer that writes each as it comes never holds a second copy of the model.
    """
    share_fused_scales(language_model, policy)
    kv_scales = _kv_quantizers(language_model) if policy.kv_cache else {}
    for name, format in policy.formats.items():
        tensors: dict[str, torch.Tensor] = {}
        if format in FORMATS:
            tensors = FORMATS[format].pack(language_model.get_submodule(module_name(name)))
        attention, _, short = name.rpartition(".")
        if attention in kv_scales and short in ("k_proj", "v_proj"):
            scale = kv_scales[attention][short == "v_proj"]
            assert scale is not None  # calibration_faults has seen to it
            tensors[f"{short[0]}_scale"] = scale
        if tensors:
            yield PackedLinear(
                name, format, {key: value.contiguous() for key, value in tensors.items()}
            )


def share_fused_scales(language_model: nn.Module, policy: Policy) -> None:
    """Give the q, k and v that vLLM fuses the ranges it wants them to share; a second call changes
    nothing.
    """
    groups: dict[str, list[nn.Module]] = {}
    for name, format in policy.quantized.items():
        attention, _, short = name.rpartition(".")
        if FORMATS[format].shares_scales and short in ("q_proj", "k_proj", "v_proj"):
            groups.setdefault(attention, []).append(language_model.get_submodule(module_name(name)))
    for modules in groups.values():
        share_scales(modules)


def _kv_quantizers(
    language_model: nn.Module,
) -> dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Scales of keys and values by checkpoint name of the attention mixer."""
    from modelopt.torch.export.quant_utils import get_kv_cache_scaling_factor

    scales = {}
    for name, module in language_model.named_modules():
        if hasattr(module, "k_bmm_quantizer") and module.k_bmm_quantizer.is_enabled:
            key, value = (
                None if scale is None else scale.float().reshape(())
                for scale in get_kv_cache_scaling_factor(module, clamp_fp8_scales=False)
            )
            scales["language_model." + name.replace("model.", "backbone.", 1)] = (key, value)
    if not scales:
        raise BadInput(
            Fault("quantize.kv_cache", "ModelOpt found no attention to quantize", "set it to null")
        )
    return scales
