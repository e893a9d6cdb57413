"""The language model one layer at a time: a layer is read while the one before it computes.

Each comes as transformers' own `NemotronHForCausalLM` with a single block under its usual name, so
that masks, names and ModelOpt's treatment are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from checkpoint.files import Reader
from checkpoint.layout import TensorSpec, select_prefix, spec_bytes
from checkpoint.libraries import language_model_classes
from checkpoint.native import native_config
from checkpoint.opened import Checkpoint

if TYPE_CHECKING:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM


def layer_specs(checkpoint: Checkpoint, layer: int) -> dict[str, TensorSpec]:
    """The BF16 tensors of one layer by checkpoint name."""
    return select_prefix(checkpoint.layout, checkpoint.config.family.layer_prefix(layer))


def largest_layer(checkpoint: Checkpoint) -> int:
    """Bytes of the largest layer's BF16 weights."""
    depth = checkpoint.config.depth
    return max(spec_bytes(layer_specs(checkpoint, layer)) for layer in range(depth))


def outside_layers(checkpoint: Checkpoint) -> int:
    """Bytes of everything but the layers: embeddings, head, projector, vision tower."""
    layer_of = checkpoint.config.family.layer_of
    specs = checkpoint.tensors.specs
    return spec_bytes({name: spec for name, spec in specs.items() if layer_of(name) is None})


class LayerBuilder:
    """Builds single layers of one checkpoint; making transformers' configs is slow."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._family = checkpoint.config.family
        self._native = _text_config(checkpoint)
        self._native.architectures = ["NemotronHForCausalLM"]
        self._empty = _text_config(checkpoint)
        self._empty.layers_block_type = []

    def build(self, layer: int, tensors: dict[str, torch.Tensor]) -> NemotronHForCausalLM:
        """Build the language model with one layer and nothing else, in `eval()` mode.

        Args:
            layer: Its index; the block is found as `model.layers.<layer>`.
            tensors: Its weights by checkpoint name, on the device that it runs on.

        Returns:
            A model whose `.model(inputs_embeds=…)` returns the residual stream after the layer,
            not normalized.
        """
        classes = language_model_classes()
        with torch.device("meta"):
            model: Any = classes.NemotronHForCausalLM(self._empty)
            self._native._attn_implementation = model.config._attn_implementation
            block = classes.NemotronHBlock(self._native, layer)
        prefix = self._family.layer_prefix(layer)
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        block.load_state_dict(state, assign=True)
        model.model.layers.add_module(str(layer), block)
        model.config = self._native
        model.model.config = self._native
        model.model.embeddings = None
        model.lm_head = None
        model.model.norm_f = nn.Identity()
        single: NemotronHForCausalLM = model.requires_grad_(False).eval()
        return single


def _text_config(checkpoint: Checkpoint) -> Any:
    """A configuration of transformers' language model, which the caller may change."""
    return native_config(checkpoint.config).text_config


def read_layers(
    checkpoint: Checkpoint, device: str, read: Reader, first: int = 0
) -> Iterator[tuple[int, NemotronHForCausalLM]]:
    """Yield the layers from `first` on with their index. Drop each before the next is requested.

    Args:
        checkpoint: Gives the layers' names.
        device: Where they run.
        read: Returns the BF16 tensor of a checkpoint name; called in a thread, one layer ahead.
        first: Index of the first layer.

    Raises:
        OSError: A file cannot be read.
    """
    depth = checkpoint.config.depth
    builder = LayerBuilder(checkpoint)

    def read_layer(layer: int) -> dict[str, torch.Tensor]:
        return {name: read(name) for name in layer_specs(checkpoint, layer)}

    if first >= depth:
        return
    with ThreadPoolExecutor(1, "read-layer") as thread:
        coming = thread.submit(read_layer, first)
        for layer in range(first, depth):
            tensors = {}
            for name, tensor in coming.result().items():
                # From page-locked memory, the copy is queued after what the GPU computes.
                tensors[name] = tensor.to(device, non_blocking=True)
            if layer + 1 < depth:
                coming = thread.submit(read_layer, layer + 1)
            model = builder.build(layer, tensors)
            del tensors
            yield layer, model
            del model
