"""Reads a quantized directory back into the native model: weights dequantized, inputs
fake-quantized as served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from checkpoint.classes import NemotronH_Omni_Reasoning_V3
from checkpoint.config import CheckpointConfig
from checkpoint.files import TensorFiles
from checkpoint.layers import read_layers
from checkpoint.layout import LAYERS
from checkpoint.native import load_model, module_name
from export.layout import linear_formats
from quantize.formats.registry import FORMATS


def packed_tensors(tensors: TensorFiles, linear: str, format: str) -> dict[str, torch.Tensor]:
    """The tensors of one quantized linear, by suffix."""
    return {suffix: tensors.read(f"{linear}.{suffix}") for suffix in FORMATS[format].suffixes}


def load_exported(
    config: CheckpointConfig, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> NemotronH_Omni_Reasoning_V3:
    """Load an exported directory, quantized or BF16, as a server computes it.

    Quantized weights are dequantized as they are read; each quantized linear rounds its input with
    ModelOpt's own quantizer at the stored scale.

    Raises:
        BadInput: As `checkpoint.native.load_model`.
    """
    tensors = TensorFiles(config.directory)
    model = load_model(config, device, dtype, exported_reader(config, tensors))
    _quantize_inputs(model.language_model, config, tensors, device)
    return model


def exported_reader(
    config: CheckpointConfig, tensors: TensorFiles
) -> Callable[[str], torch.Tensor]:
    """What reads a BF16 tensor of an exported directory by its name, quantized weights dequantized."""
    formats = linear_formats(config, tensors.specs)

    def read(name: str) -> torch.Tensor:
        linear = name.removesuffix(".weight")
        if linear not in formats:
            return tensors.read(name)
        return (
            FORMATS[formats[linear]]
            .unpack(packed_tensors(tensors, linear, formats[linear]))
            .to(torch.bfloat16)
        )

    return read


def read_exported_layers(config: CheckpointConfig, device: str) -> Iterator[tuple[int, nn.Module]]:
    """The layers of an exported directory one at a time, as `checkpoint.layers.read_layers`,
    computing as served.
    """
    tensors = TensorFiles(config.directory)
    for layer, model in read_layers(config, device, exported_reader(config, tensors)):
        _quantize_inputs(model, config, tensors, device, layer)
        yield layer, model


def _quantize_inputs(
    language_model: nn.Module,
    config: CheckpointConfig,
    tensors: TensorFiles,
    device: str,
    layer: int | None = None,
) -> None:
    """Let every quantized linear, of one layer or of all, round its input at the stored scale."""
    for linear, format in linear_formats(config, tensors.specs).items():
        if layer is None or linear.startswith(f"{LAYERS}{layer}."):
            module = language_model.get_submodule(module_name(linear))
            amax = FORMATS[format].input_amax(tensors.read(f"{linear}.input_scale"))
            _quantize_input(
                module, FORMATS[format].quantizer("input_quantizer", device), amax.to(device)
            )


def _quantize_input(module: nn.Module, settings: dict[str, Any], amax: torch.Tensor) -> None:
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**settings), amax=amax)

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (quantizer(inputs[0]), *inputs[1:])

    module.register_forward_pre_hook(hook)
