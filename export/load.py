"""Reads a quantized directory back into the native model: weights dequantized, inputs
fake-quantized as they are served.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from checkpoint.files import Reader
from checkpoint.layers import read_layers
from checkpoint.native import load_model
from checkpoint.opened import Checkpoint
from export.layout import linear_formats, packed_tensors
from quantize.formats.registry import FORMATS, INPUT_QUANTIZER

if TYPE_CHECKING:
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3


def load_exported(
    exported: Checkpoint, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> NemotronH_Omni_Reasoning_V3:
    """Load an exported directory, quantized or BF16, so that it computes as a server does.

    Quantized weights are dequantized as they are read. Each linear whose format quantizes
    activations rounds its input with ModelOpt's own quantizer at the stored scale.

    Raises:
        BadInput: As `checkpoint.native.load_model` and `export.layout.linear_formats`.
    """
    formats = linear_formats(exported.config)
    model = load_model(exported, device, dtype, _reader(exported, formats))
    _quantize_inputs(model.language_model, exported, formats, device)
    return model


def exported_reader(exported: Checkpoint) -> Reader:
    """Return a function that reads a BF16 tensor of an exported directory by its name, with
    quantized weights dequantized.
    """
    return _reader(exported, linear_formats(exported.config))


def read_exported_layers(exported: Checkpoint, device: str) -> Iterator[tuple[int, nn.Module]]:
    """Yield the layers of an exported directory as `checkpoint.layers.read_layers` does, computing
    as they are served.
    """
    formats = linear_formats(exported.config)
    family = exported.config.family
    for layer, model in read_layers(exported, device, _reader(exported, formats)):
        part = {name: format for name, format in formats.items() if family.layer_of(name) == layer}
        _quantize_inputs(model, exported, part, device)
        yield layer, model
        del model


def _reader(exported: Checkpoint, formats: Mapping[str, str]) -> Reader:
    def read(name: str) -> torch.Tensor:
        linear = name.removesuffix(".weight")
        if linear not in formats:
            return exported.tensors.read(name)
        format = formats[linear]
        packed = packed_tensors(exported.tensors, linear, format)
        return FORMATS[format].unpack(packed).to(torch.bfloat16)

    return read


def _quantize_inputs(
    language_model: nn.Module, exported: Checkpoint, formats: Mapping[str, str], device: str
) -> None:
    """Let quantized linears round their inputs at the stored scale."""
    for linear, name in formats.items():
        format = FORMATS[name]
        if format.input_amax is None:
            continue
        amax = format.input_amax(exported.tensors.read(f"{linear}.input_scale"))
        settings = format.quantizer_settings(INPUT_QUANTIZER, device)
        module = language_model.get_submodule(exported.config.family.native_module(linear))
        _quantize_input(module, settings, amax.to(device))


def _quantize_input(module: nn.Module, settings: Mapping[str, Any], amax: torch.Tensor) -> None:
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**settings), amax=amax)

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (quantizer(inputs[0]), *inputs[1:])

    module.register_forward_pre_hook(hook)
