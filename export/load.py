"""Reads a quantized directory back into the native model: weights dequantized, inputs fake-quantized as served."""

from __future__ import annotations

from typing import Any

import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn
from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3

from checkpoint.config import CheckpointConfig
from checkpoint.files import TensorFiles
from checkpoint.native import load_model, module_name
from export.layout import linear_formats
from quantize.formats import FORMATS


def packed_tensors(tensors: TensorFiles, linear: str, format: str) -> dict[str, torch.Tensor]:
    """The tensors of one quantized linear, by suffix."""
    return {suffix: tensors.read(f"{linear}.{suffix}") for suffix in FORMATS[format].suffixes}


def load_exported(
    config: CheckpointConfig, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> NemotronH_Omni_Reasoning_V3:
    """Load an exported directory, quantized or BF16, as a server computes it.

    Quantized weights are dequantized as they are read; each quantized linear rounds its input with ModelOpt's own
    quantizer at the stored scale.

    Raises:
        BadInput: As `checkpoint.native.load_model`.
    """
    tensors = TensorFiles(config.directory)
    formats = linear_formats(config, tensors.specs)

    def read(name: str) -> torch.Tensor:
        linear = name.removesuffix(".weight")
        if linear not in formats:
            return tensors.read(name)
        return FORMATS[formats[linear]].unpack(packed_tensors(tensors, linear, formats[linear])).to(torch.bfloat16)

    model = load_model(config, device, dtype, read)
    for linear, format in formats.items():
        module = model.language_model.get_submodule(module_name(linear))
        amax = FORMATS[format].input_amax(tensors.read(f"{linear}.input_scale"))
        _quantize_input(module, FORMATS[format].quantizer("input_quantizer", device), amax.to(device))
    return model


def _quantize_input(module: nn.Module, settings: dict[str, Any], amax: torch.Tensor) -> None:
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**settings), amax=amax)

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (quantizer(inputs[0]), *inputs[1:])

    module.register_forward_pre_hook(hook)
