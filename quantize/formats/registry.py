"""What a quantization format is, and the register of the formats that recipes can name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from checkpoint.layout import TensorSpec, spec_bytes

Tensors = Mapping[str, torch.Tensor]
"""The tensors of one packed linear by suffix: `weight`, `weight_scale`, …"""

UNQUANTIZED = "bf16"
"""What a policy writes for a linear that stays as it is."""

MIXED_PRECISION = "MIXED_PRECISION"
"""`quant_algo` of a checkpoint with several formats; `quantized_layers` then names each linear's.
"""

WEIGHT_QUANTIZER = "weight_quantizer"
INPUT_QUANTIZER = "input_quantizer"


@dataclass(frozen=True)
class Format:
    """One quantization format of a linear of shape (out, in).

    Attributes:
        name: As recipes write it.
        algo: `quant_algo`, the name that vLLM and ModelOpt give it.
        weight_quantizer: ModelOpt's settings of the weight quantizer.
        input_quantizer: ModelOpt's settings of the input quantizer; None for a weight-only format,
            whose activations stay in BF16.
        tensors: Returns names, shapes and dtypes on disk for a shape (out, in).
        pack: Returns the tensors on disk of a module that ModelOpt has calibrated.
        unpack: Returns the float32 weight [out, in] that packed tensors represent.
        error_bound: Returns, for a float32 source weight [out, in] and its packed tensors, the
            largest |unpacked − source| that rounding can cause, for each element.
        largest: Returns the largest magnitude that packed tensors can represent, for each element
            or for all of them.
        relative_error: ‖unpacked − source‖ / ‖source‖ after rounding with absolute maxima as
            ranges, measured on normally distributed weights.
        multiple: in_features must be a multiple of this.
        group_size: Number of consecutive weights under one block scale, as config files state it;
            None for a format without block scales.
        shares_ranges: Whether linears that vLLM fuses must be given one input range and one global
            weight range before they are packed.
        fused_scales: Suffixes of the scalar scales that must be equal in linears that vLLM fuses.
        input_amax: Returns the input range that a stored `input_scale` represents; None for a
            weight-only format.
        cpu_backend: Registers a ModelOpt backend that fake-quantizes without CUDA and returns its
            name; None if ModelOpt's own code runs on a CPU.
        searched_weight_quantizer: The weight quantizer's settings for algorithms that set each
            block scale; None for a format without block scales.
    """

    name: str
    algo: str
    weight_quantizer: Mapping[str, Any]
    input_quantizer: Mapping[str, Any] | None
    tensors: Callable[[tuple[int, int]], dict[str, TensorSpec]]
    pack: Callable[[Any], dict[str, torch.Tensor]]
    unpack: Callable[[Tensors], torch.Tensor]
    error_bound: Callable[[torch.Tensor, Tensors], torch.Tensor]
    largest: Callable[[Tensors], torch.Tensor]
    relative_error: float
    multiple: int
    group_size: int | None
    shares_ranges: bool
    fused_scales: tuple[str, ...]
    input_amax: Callable[[torch.Tensor], torch.Tensor] | None
    cpu_backend: Callable[[], str] | None = None
    searched_weight_quantizer: Mapping[str, Any] | None = None

    @property
    def quantizers(self) -> tuple[str, ...]:
        """Names of the ModelOpt quantizers that a linear of this format has enabled."""
        if self.input_quantizer is None:
            return (WEIGHT_QUANTIZER,)
        return (WEIGHT_QUANTIZER, INPUT_QUANTIZER)

    @property
    def has_block_scales(self) -> bool:
        """Whether each group of weights has its own scale."""
        return self.group_size is not None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What follows a linear's name in the names of its tensors on disk."""
        return tuple(self.tensors((self.multiple, self.multiple)))

    @property
    def bits(self) -> float:
        """Bits per weight on disk, block scales included: 8 for FP8, 4.5 for NVFP4."""
        side = 4096
        return round(8 * spec_bytes(self.tensors((side, side))) / side**2, 2)

    @property
    def config_entry(self) -> dict[str, Any]:
        """What config files state about a linear of this format."""
        entry: dict[str, Any] = {"quant_algo": self.algo}
        if self.group_size is not None:
            entry["group_size"] = self.group_size
        return entry

    def quantizer_settings(
        self, quantizer: str, device: str, is_searched: bool = False
    ) -> dict[str, Any]:
        """Return ModelOpt's settings of one of `quantizers`.

        Where the format needs it, a ModelOpt backend for CPUs is registered.

        Args:
            quantizer: `weight_quantizer` or `input_quantizer`.
            device: The torch device that the model is on.
            is_searched: Whether the calibration algorithm sets each block scale.
        """
        backend = None
        if self.cpu_backend is not None and not device.startswith("cuda"):
            backend = self.cpu_backend()
        if quantizer == INPUT_QUANTIZER:
            if self.input_quantizer is None:
                raise ValueError(f"{self.name} has no input quantizer")
            settings = self.input_quantizer
        elif is_searched and self.searched_weight_quantizer is not None:
            # ModelOpt searches the scales only of quantizers without a backend, and quantizers with
            # static scales never use one.
            settings = self.searched_weight_quantizer
            backend = None
        else:
            settings = self.weight_quantizer
        copied = copy.deepcopy(dict(settings))
        if backend is not None:
            copied["backend"] = backend
        return copied


FORMATS: dict[str, Format] = {}
"""All registered formats by the name that recipes write."""


def register_format(format: Format) -> None:
    """Make a format known; a second call with the same name replaces the first.

    Raises:
        ValueError: Its name is `bf16`, or another format has its `quant_algo`.
    """
    if format.name == UNQUANTIZED:
        raise ValueError(f"{UNQUANTIZED} is the name of what is not quantized")
    other = find_format(format.algo)
    if other is not None and other.name != format.name:
        raise ValueError(f"quant_algo {format.algo} is that of the format {other.name}")
    FORMATS[format.name] = format


def find_format(algo: object) -> Format | None:
    """Return the format with this `quant_algo`; None if there is none. vLLM ignores its case."""
    for format in FORMATS.values():
        if format.algo == str(algo).upper():
            return format
    return None


def preset_settings(preset: Mapping[str, Any], quantizer: str) -> dict[str, Any]:
    """Return the settings that a ModelOpt preset gives to every weight or input quantizer.

    Args:
        preset: Such as `mtq.FP8_DEFAULT_CFG`.
        quantizer: `weight_quantizer` or `input_quantizer`.
    """
    found = []
    for entry in preset["quant_cfg"]:
        if entry["quantizer_name"] == f"*{quantizer}" and "cfg" in entry:
            found.append(entry["cfg"])
    (settings,) = found
    return copy.deepcopy(settings)


def scalar(scale: torch.Tensor) -> torch.Tensor:
    """Return a scale of one element as float32 of shape []."""
    return scale.float().reshape(())
