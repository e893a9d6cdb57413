"""PTQ a layer at a time: the model is never whole in memory, and the result is bit for bit that of
the whole model.

Max calibration runs with fake quantization off, so what a layer passes on is the BF16 output, as in
the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from calibrate.activations import Activations
from calibrate.layerwise import Batching, runner
from checkpoint.config import CheckpointConfig
from checkpoint.layers import Reader, read_layers
from checkpoint.layout import LAYERS
from quantize.policy import Policy
from quantize.ptq import PackedLinear, packed_linears, quantize_model


@dataclass(frozen=True)
class FinishedLayer:
    """A layer that every sample has passed.

    Attributes:
        index: Of the layer.
        linears: Its quantized linears, packed; none where an earlier run has written them.
    """

    index: int
    linears: tuple[PackedLinear, ...]


def layer_policy(policy: Policy, config: CheckpointConfig, layer: int) -> Policy:
    """The part of a policy that speaks of one layer."""
    prefix = f"{LAYERS}{layer}."
    formats = {name: format for name, format in policy.formats.items() if name.startswith(prefix)}
    return Policy(formats, policy.kv_cache if config.mixer_kind(layer) == "attention" else None)


def quantize_layers(
    config: CheckpointConfig,
    policy: Policy,
    read: Reader,
    device: str,
    calibration: Activations,
    held_out: Activations,
    batch_tokens: int,
    first: int = 0,
    finished: int = 0,
) -> Iterator[FinishedLayer]:
    """Calibrate and pack layer by layer.

    In several processes, each with samples of its own, ModelOpt takes every range's maximum over
    all of them.

    Args:
        config: The BF16 checkpoint's.
        policy: Format by linear.
        read: Gives the BF16 tensor of a checkpoint name.
        device: Where layers run.
        calibration: What layer `first` is given; afterwards, what the last layer gave.
        held_out: Samples that pass through the BF16 layers without being calibrated on.
        batch_tokens: Samples of one length run together up to so many tokens.
        first: The layer to begin with.
        finished: Layers that an earlier run has written: samples only pass through them.

    Raises:
        BadInput: When a quantizer has no finite positive range.
        torch.OutOfMemoryError: When the device is too small.
    """
    batching, depth, tokens = Batching(batch_tokens), len(config.pattern), sum(calibration.lengths)
    with tqdm(total=depth, initial=first, desc="layers", unit="layer", disable=None) as bar:
        for layer, model in read_layers(config, device, read, first):
            kind, part = config.mixer_kind(layer), layer_policy(policy, config, layer)
            if layer < finished:
                part = Policy({})
            linears = _pass(model, part, calibration, held_out, batching, kind)
            del model
            bar.update()
            elapsed = bar.format_dict["elapsed"] if not bar.disable else 0
            rate = tokens * (layer + 1 - first) / depth / elapsed if elapsed else 0
            bar.set_postfix_str(f"{rate:,.0f} tokens/s" if rate else "", refresh=False)
            yield FinishedLayer(layer, linears)


@torch.no_grad()
def _pass(
    model: nn.Module,
    policy: Policy,
    calibration: Activations,
    held_out: Activations,
    batching: Batching,
    kind: str,
) -> tuple[PackedLinear, ...]:
    """Pass all samples through one layer; its packed linears, where the policy quantizes anything
    in it.
    """
    run = runner(model)
    held_out.replace(run, batching.batches(held_out, model, kind))
    batches = batching.batches(calibration, model, kind)
    if not policy.quantized and not policy.kv_cache:
        calibration.replace(run, batches)
        return ()
    quantize_model(model, policy, lambda: calibration.replace(run, batches))
    return tuple(packed_linears(model, policy))
