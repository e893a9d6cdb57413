"""The vision tower: its linears in FP8, if that is asked for, and without its layer scales.

HYBRIDQUANT_FP8_TOWER=1 quantizes the tower's linears while vLLM loads them, by vLLM's own online
quantization: weights with one scale per tensor, activations with one per token (per tensor where
vLLM has no Cutlass FP8 kernels). Attention, norms and the patch embedding stay in BF16. It is off
by default, because it changes the features that EVS and the language model see.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config.quantization import resolve_quantization_config
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
from vllm.model_executor.models.radio import RadioModel, RadioVisionEncoderLayer

from hybridquant_vllm.switches import is_on

SWITCH = "HYBRIDQUANT_FP8_TOWER"


class UnscaledEncoderLayer(RadioVisionEncoderLayer):
    """A block of the tower without its two layer scales, which this model does not have.

    vLLM loads no weights for them, so both multiply all activations by ones.
    """

    def forward(self, hidden_states: torch.Tensor, mask_meta: Any = None) -> torch.Tensor:
        """Return the block's output, [batch, tokens, hidden]."""
        attended = self.attn(self.norm1(hidden_states), mask_meta=mask_meta)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.norm2(hidden_states))


def drop_layer_scales(tower: torch.nn.Module) -> None:
    """Make blocks skip their layer scales where all of them are ones.

    Args:
        tower: A loaded tower; one that is no `RadioModel` stays as it is.
    """
    if not isinstance(tower, RadioModel):
        return
    for layer in tower.model.encoder.layers:
        scales = torch.stack([layer.ls1, layer.ls2])
        # vLLM builds the blocks itself and takes no class for them.
        if type(layer) is RadioVisionEncoderLayer and bool((scales == 1).all()):
            layer.__class__ = UnscaledEncoderLayer


def wants_fp8() -> bool:
    """Return whether the environment asks for a tower whose linears are in FP8."""
    return is_on(SWITCH, default=False)


def fp8_tower(config: Any) -> RadioModel:
    """Build a tower whose linears vLLM quantizes to FP8 while it loads them.

    Args:
        config: A `RadioConfig`.
    """
    arguments = resolve_quantization_config("fp8_per_tensor", None)
    return RadioModel(config=config, quant_config=OnlineQuantizationConfig(arguments))
