"""Calibrates the language model with ModelOpt and yields its quantized tensors linear by linear."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export.quant_utils import get_kv_cache_scaling_factor, preprocess_linear_fusion
from torch import nn

from checkpoint.faults import BadInput, Fault, raise_if_any
from quantize.algorithms import ALGORITHMS, modelopt_algorithm
from quantize.formats.registry import FORMATS, INPUT_QUANTIZER, UNQUANTIZED, scalar
from quantize.modelopt_output import printed_to_log
from quantize.policy import Policy
from quantize.ranges import DeviceMax, WeightMax

Result = TypeVar("Result")

_NO_RANGE = "did the calibration samples reach this layer, and are they and the weights finite?"
_NAN = "was given NaN in calibration"
_NAN_REMEDY = "are the weights before it finite?"


@dataclass(frozen=True)
class PackedLinear:
    """One linear layer in its final form.

    Attributes:
        name: Checkpoint name without `.weight`.
        format: A key of `FORMATS`, or `bf16` for a linear that only carries a KV cache scale.
        tensors: By the suffix that they get on disk, on the device of the model.
    """

    name: str
    format: str
    tensors: dict[str, torch.Tensor]

    def by_name(self) -> dict[str, torch.Tensor]:
        """Return the tensors by the names that they get on disk."""
        return {f"{self.name}.{suffix}": tensor for suffix, tensor in self.tensors.items()}


def modelopt_config(
    policy: Policy, algorithm: str = "max", device: str = "cpu", gptq_damping: float = 0.01
) -> dict[str, Any]:
    """Return the `mtq.quantize` configuration of a policy.

    Everything is disabled first, then each linear is named in full instead of by patterns: what
    ModelOpt enables is exactly what the policy lists.
    """
    is_searched = ALGORITHMS[algorithm].searches_blocks
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, format in policy.quantized.items():
        module = policy.family.native_module(name)
        for quantizer in FORMATS[format].quantizers:
            settings = FORMATS[format].quantizer_settings(quantizer, device, is_searched)
            if algorithm == "max":
                is_input = quantizer == INPUT_QUANTIZER
                calibrator = DeviceMax if is_input else WeightMax
                # ModelOpt makes the calibrator after it has set the axis, which would be lost.
                settings["calibrator"] = (calibrator, (), {"axis": settings.get("axis")})
            entry = {"quantizer_name": f"{module}.{quantizer}", "cfg": settings, "enable": True}
            entries.append(entry)
    if policy.kv_cache == "fp8":
        entries += [dict(entry) for entry in mtq.FP8_KV_CFG["quant_cfg"]]
    section = modelopt_algorithm(algorithm, policy, device, gptq_damping)
    return {"quant_cfg": entries, "algorithm": section}


def quantize_model(
    language_model: nn.Module,
    policy: Policy,
    forward_loop: Callable[[], Result],
    algorithm: str = "max",
    gptq_damping: float = 0.01,
) -> Result:
    """Insert ModelOpt's quantizers into the language model and calibrate them, in place.

    Args:
        language_model: The native `NemotronHForCausalLM`. It is put into `eval()` mode: in
            `train()` the fused Mamba path reads `out_proj.weight` directly and its quantizers see
            nothing.
        policy: Format by linear.
        forward_loop: Runs the language model over the calibration samples; called once or, for
            algorithms that repeat, several times.
        algorithm: A key of `quantize.algorithms.ALGORITHMS`.
        gptq_damping: GPTQ's, as a share of the mean diagonal of the Hessian.

    Returns:
        What the last forward loop returned.

    Raises:
        BadInput: Quantizers that should be enabled have no finite positive range; with their names.
    """
    language_model.eval()
    device = next(language_model.parameters()).device.type
    config = modelopt_config(policy, algorithm, device, gptq_damping)
    results: list[Result] = []

    def run_samples(_: nn.Module) -> None:
        results.append(forward_loop())

    try:
        with printed_to_log(), warnings.catch_warnings():
            # calibration_faults reports every such range, with the name of its quantizer.
            warnings.filterwarnings("ignore", message=".*contains invalid values")
            mtq.quantize(language_model, config, run_samples)
    except AssertionError as error:  # raised by ModelOpt's own calibrator when it is given NaN
        if "nan" not in str(error):
            raise
        raise BadInput(_first_nan(language_model, policy)) from None
    raise_if_any(calibration_faults(language_model, policy))
    return results[-1]


def calibration_faults(language_model: nn.Module, policy: Policy) -> list[Fault]:
    """Return a fault for every quantizer of the policy without a finite positive range."""
    faults: list[Fault] = []
    for name, format in policy.quantized.items():
        module = language_model.get_submodule(policy.family.native_module(name))
        for quantizer in FORMATS[format].quantizers:
            fault = _range_fault(f"{name}.{quantizer}", getattr(module, quantizer, None))
            if fault is None:
                continue
            faults.append(fault)
            if fault.what == _NAN:  # every later quantizer was given NaN as well
                return faults
    if policy.kv_cache:
        for name, scales in _kv_scales(language_model, policy).items():
            if any(scale is None for scale in scales.values()):
                faults.append(Fault(name, "has no KV cache range after calibration", _NO_RANGE))
    return faults


def _range_fault(where: str, quantizer: Any) -> Fault | None:
    if quantizer is None or not quantizer.is_enabled:
        return Fault(where, "is not enabled", "this is a defect: report it")
    amax = quantizer.amax
    # A static quantizer has an amax for each block, which is zero where all its weights are zero.
    if getattr(quantizer, "global_amax", None) is not None:
        amax = quantizer.global_amax
    if amax is None:
        return Fault(where, "has no amax after calibration", _NO_RANGE)
    if bool(torch.isnan(amax).any()):
        return Fault(where, _NAN, _NAN_REMEDY)
    if not bool((torch.isfinite(amax) & (amax > 0)).all()):
        found = amax.flatten()[:4].tolist()
        return Fault(where, f"has amax {found} after calibration", _NO_RANGE)
    return None


def _first_nan(language_model: nn.Module, policy: Policy) -> Fault:
    """The first linear of the model that had seen no finite input when calibration stopped."""
    for name, format in policy.quantized.items():
        if INPUT_QUANTIZER not in FORMATS[format].quantizers:
            continue
        quantizer = language_model.get_submodule(policy.family.native_module(name)).input_quantizer
        # No public attribute of ModelOpt 0.47 gives a range before the calibration has ended.
        if quantizer.amax is None and quantizer._calibrator.compute_amax() is None:
            return Fault(f"{name}.{INPUT_QUANTIZER}", _NAN, _NAN_REMEDY)
    return Fault("calibration", "was given NaN", "are the weights finite?")


def packed_linears(language_model: nn.Module, policy: Policy) -> Iterator[PackedLinear]:
    """Yield every quantized linear in the model's order, packed as ModelOpt's exporter does.

    Nothing is kept: a consumer that writes each as it comes never holds a second copy of the model.
    Linears without a format are yielded if they carry a KV cache scale.
    """
    share_fused_scales(language_model, policy)
    kv_scales = _kv_scales(language_model, policy) if policy.kv_cache else {}
    for name, format in policy.formats.items():
        tensors: dict[str, torch.Tensor] = {}
        if format != UNQUANTIZED:
            module = language_model.get_submodule(policy.family.native_module(name))
            tensors.update(FORMATS[format].pack(module))
        mixer, _, short = name.rpartition(".")
        if mixer in kv_scales and short in policy.family.kv_linears:
            scale = kv_scales[mixer][short]
            assert scale is not None  # calibration_faults has refused it
            tensors[policy.family.kv_linears[short]] = scale
        if tensors:
            contiguous = {suffix: tensor.contiguous() for suffix, tensor in tensors.items()}
            yield PackedLinear(name, format, contiguous)


def share_fused_scales(language_model: nn.Module, policy: Policy) -> None:
    """Give linears that vLLM fuses one input range and one global weight range, where their format
    needs it. A second call changes nothing.
    """
    for names in policy.fused_groups():
        if FORMATS[policy.formats[names[0]]].shares_ranges:
            modules = [policy.family.native_module(name) for name in names]
            preprocess_linear_fusion([language_model.get_submodule(module) for module in modules])


def _kv_scales(
    language_model: nn.Module, policy: Policy
) -> dict[str, dict[str, torch.Tensor | None]]:
    """KV cache scales by checkpoint name of the attention mixer and by `k_proj` and `v_proj`."""
    scales: dict[str, dict[str, torch.Tensor | None]] = {}
    for name, module in language_model.named_modules():
        if not hasattr(module, "k_bmm_quantizer") or not module.k_bmm_quantizer.is_enabled:
            continue
        # Clamping is ModelOpt's default here, but not in its exporter.
        found = get_kv_cache_scaling_factor(module, clamp_fp8_scales=False)
        mixer = policy.family.checkpoint_name(name)
        scales[mixer] = {}
        # ModelOpt returns the scale of the keys first, then that of the values.
        for short, scale in zip(policy.family.kv_linears, found, strict=True):
            scales[mixer][short] = None if scale is None else scalar(scale)
    if not scales:
        what = "ModelOpt found no attention to quantize"
        raise BadInput(Fault("quantize.kv_cache", what, "set it to null"))
    return scales
