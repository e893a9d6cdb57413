"""The language model one layer at a time: each read while the one before it computes, and dropped
after it.

What comes is transformers' own `NemotronHForCausalLM` that holds a single block under its usual
name, so that masks, names and ModelOpt's treatment of it are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from checkpoint.classes import NemotronHBlock, NemotronHForCausalLM
from checkpoint.config import CheckpointConfig
from checkpoint.layout import LAYERS, TensorSpec, expected_tensors, spec_bytes
from checkpoint.native import native_config

Reader = Callable[[str], torch.Tensor]


def layer_specs(config: CheckpointConfig, layer: int) -> dict[str, TensorSpec]:
    """The tensors of one layer by checkpoint name."""
    prefix = f"{LAYERS}{layer}."
    return {
        name: spec for name, spec in expected_tensors(config).items() if name.startswith(prefix)
    }


def largest_layer(config: CheckpointConfig) -> int:
    """Bytes of the largest layer's weights."""
    sizes = [0] * len(config.pattern)
    for name, spec in expected_tensors(config).items():
        if name.startswith(LAYERS):
            sizes[int(name.removeprefix(LAYERS).partition(".")[0])] += spec_bytes({name: spec})
    return max(sizes)


def layer_configs(config: CheckpointConfig) -> tuple[Any, Any]:
    """transformers' configuration of the language model, and of one without layers; made once, for
    it is slow.
    """
    native, empty = native_config(config).text_config, native_config(config).text_config
    empty.layers_block_type = []  # type: ignore[union-attr]
    return native, empty


def single_layer(
    configs: tuple[Any, Any], layer: int, tensors: dict[str, torch.Tensor]
) -> NemotronHForCausalLM:
    """The language model with one layer and nothing else, in `eval()` mode.

    Args:
        configs: From `layer_configs`.
        layer: Its index; the block is found as `model.layers.<layer>`.
        tensors: Its weights by checkpoint name, on the device it is to run on.

    Returns:
        A model of which `.model(inputs_embeds=…)` gives the residual stream behind the layer, not
        normalised.
    """
    native, empty = configs
    with torch.device("meta"):
        model: Any = NemotronHForCausalLM(empty)
        native._attn_implementation = model.config._attn_implementation
        block = NemotronHBlock(native, layer)
    prefix = f"{LAYERS}{layer}."
    block.load_state_dict(
        {name.removeprefix(prefix): t for name, t in tensors.items()}, assign=True
    )
    model.model.layers.add_module(str(layer), block)
    model.config = model.model.config = native
    native.architectures = ["NemotronHForCausalLM"]
    model.model.embeddings = model.lm_head = None
    model.model.norm_f = nn.Identity()
    alone: NemotronHForCausalLM = model.requires_grad_(False).eval()
    return alone


def read_layers(
    config: CheckpointConfig, device: str, read: Reader, first: int = 0
) -> Iterator[tuple[int, NemotronHForCausalLM]]:
    """Yield the layers from `first` on with their index; drop each before asking for the next.

    Args:
        config: The checkpoint's.
        device: Where they are to run.
        read: Gives the BF16 tensor of a checkpoint name; called in a thread of its own, one layer
            ahead.
        first: Index of the first layer wanted.

    Raises:
        OSError: When a file cannot be read.
    """
    depth, configs = len(config.pattern), layer_configs(config)
    names = [list(layer_specs(config, layer)) for layer in range(depth)]
    with ThreadPoolExecutor(1, "read-layer") as thread:

        def ahead(layer: int) -> dict[str, torch.Tensor]:
            return {name: read(name) for name in names[layer]}

        coming = thread.submit(ahead, first) if first < depth else None
        for layer in range(first, depth):
            assert coming is not None
            # non_blocking: from page-locked memory the copy queues behind what the GPU is doing.
            tensors = {
                name: tensor.to(device, non_blocking=True)
                for name, tensor in coming.result().items()
            }
            coming = thread.submit(ahead, layer + 1) if layer + 1 < depth else None
            model = single_layer(configs, layer, tensors)
            del tensors
            yield layer, model
            del model
