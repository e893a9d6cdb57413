"""PTQ layer by layer: the model is never whole in memory, and the result is bit for bit that of the
whole model.

Max calibration runs with fake quantization disabled, so a layer passes on its BF16 output, as in
the whole model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from calibrate.activations import Activations
from calibrate.layerwise import Batching, runner
from checkpoint.config import CheckpointConfig
from checkpoint.files import Reader
from checkpoint.layers import read_layers
from checkpoint.opened import Checkpoint
from quantize.policy import Policy
from quantize.ptq import PackedLinear, packed_linears, quantize_model


@dataclass(frozen=True)
class FinishedLayer:
    """A layer that every sample has passed.

    Attributes:
        index: Index of the layer.
        linears: Its quantized linears, packed; none where an earlier run has written them.
    """

    index: int
    linears: tuple[PackedLinear, ...]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the packed tensors by the names that they get on disk."""
        tensors: dict[str, torch.Tensor] = {}
        for linear in self.linears:
            tensors.update(linear.by_name())
        return tensors


def layer_policy(policy: Policy, config: CheckpointConfig, layer: int) -> Policy:
    """Return the part of a policy that applies to one layer."""
    prefix = policy.family.layer_prefix(layer)
    formats = {name: format for name, format in policy.formats.items() if name.startswith(prefix)}
    kv_cache = policy.kv_cache
    if config.mixer_kind(layer) != "attention":
        kv_cache = None
    return dataclasses.replace(policy, formats=formats, kv_cache=kv_cache)


def quantize_layers(
    checkpoint: Checkpoint,
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

    In several processes, each with its own samples, ModelOpt takes the maximum of every range
    over all of them.

    Args:
        checkpoint: The BF16 checkpoint.
        policy: Format by linear.
        read: Returns the BF16 tensor of a checkpoint name.
        device: Where layers run.
        calibration: The input of layer `first`; afterwards, the output of the last layer.
        held_out: Samples that pass through the BF16 layers without being calibrated on.
        batch_tokens: Samples of one length run together up to this many tokens.
        first: The layer to begin with.
        finished: Number of layers that an earlier run has written: samples only pass through them.

    Raises:
        BadInput: A quantizer has no finite positive range.
        torch.OutOfMemoryError: The device is too small.
    """
    batching = Batching(batch_tokens)
    depth = checkpoint.config.depth
    tokens_per_layer = sum(calibration.lengths) / depth
    with tqdm(total=depth, initial=first, desc="layers", unit="layer", disable=None) as bar:
        for layer, model in read_layers(checkpoint, device, read, first):
            part = layer_policy(policy, checkpoint.config, layer)
            if layer < finished:
                part = Policy({})
            kind = checkpoint.config.mixer_kind(layer)
            linears = _pass_samples(model, part, calibration, held_out, batching, kind)
            del model
            bar.update()
            _show_rate(bar, tokens_per_layer * (layer + 1 - first))
            yield FinishedLayer(layer, linears)


def _show_rate(bar: tqdm, tokens: float) -> None:
    """Show how many tokens per second pass through the whole model."""
    elapsed = 0.0 if bar.disable else bar.format_dict["elapsed"]
    if elapsed > 0:
        bar.set_postfix_str(f"{tokens / elapsed:,.0f} tokens/s", refresh=False)


@torch.no_grad()
def _pass_samples(
    model: nn.Module,
    policy: Policy,
    calibration: Activations,
    held_out: Activations,
    batching: Batching,
    kind: str,
) -> tuple[PackedLinear, ...]:
    """Pass all samples through one layer and return its packed linears, if any is quantized."""
    run = runner(model)
    held_out.replace(run, batching.batches(held_out, model, kind))
    batches = batching.batches(calibration, model, kind)
    if not policy.quantized and not policy.kv_cache:
        calibration.replace(run, batches)
        return ()
    quantize_model(model, policy, partial(calibration.replace, run, batches))
    return tuple(packed_linears(model, policy))
