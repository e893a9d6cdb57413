"""The tensors that a checkpoint must hold, computed from its config: names, shapes, dtypes,
linears.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from checkpoint.config import CheckpointConfig
from checkpoint.dtypes import BYTES


@dataclass(frozen=True)
class TensorSpec:
    """Shape and safetensors dtype (`BF16`, `I64`, `F8_E4M3`, …) of one tensor."""

    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return BYTES[self.dtype] * math.prod(self.shape)


Specs = Mapping[str, TensorSpec]
"""Tensors by name."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of the language model, a candidate for quantization.

    Attributes:
        name: Checkpoint name without `.weight`.
        kind: `mamba`, `mlp` or `attention`.
        layer: Index of its layer.
        shape: (out_features, in_features).
    """

    name: str
    kind: str
    layer: int
    shape: tuple[int, int]

    @property
    def short(self) -> str:
        """The last part of the name: `in_proj`, `q_proj`, `up_proj`, …"""
        return self.name.rsplit(".", 1)[1]

    @property
    def mixer(self) -> str:
        """The name of the mixer that it belongs to."""
        return self.name.rsplit(".", 1)[0]


def spec_bytes(specs: Specs) -> int:
    """Bytes of the tensors that `specs` describe."""
    return sum(spec.nbytes for spec in specs.values())


def select_prefix(specs: Specs, prefix: str) -> dict[str, TensorSpec]:
    """The tensors whose name begins with `prefix`."""
    return {name: spec for name, spec in specs.items() if name.startswith(prefix)}


def split_by_size(specs: Specs, shard_bytes: int) -> list[list[str]]:
    """Divide tensors into shards, in order.

    Returns:
        Tensor names by shard. No shard is larger than `shard_bytes` unless a single tensor is.
    """
    shards: list[list[str]] = []
    size = 0
    for name, spec in specs.items():
        if not shards or size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def language_model_linears(config: CheckpointConfig) -> list[Linear]:
    """Every linear layer of the language model's blocks, in order.

    The embeddings, `lm_head` and `conv1d` are not among them.
    """
    shapes = _linear_shapes(config)
    linears = []
    for layer in range(config.depth):
        kind = config.mixer_kind(layer)
        prefix = config.family.layer_prefix(layer)
        for short, shape in shapes[kind].items():
            linears.append(Linear(f"{prefix}mixer.{short}", kind, layer, shape))
    return linears


def _linear_shapes(config: CheckpointConfig) -> dict[str, dict[str, tuple[int, int]]]:
    """(out_features, in_features) of each linear by kind of mixer."""
    text = config.text
    hidden = text["hidden_size"]
    heads = text["mamba_num_heads"]
    inner = heads * text["mamba_head_dim"]
    groups = text["n_groups"] * text["ssm_state_size"]
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    return {
        # Rows of in_proj: gate z, x, B, C and one step size dt per head.
        "mamba": {
            "in_proj": (2 * inner + 2 * groups + heads, hidden),
            "out_proj": (hidden, inner),
        },
        "mlp": {
            "up_proj": (text["intermediate_size"], hidden),
            "down_proj": (hidden, text["intermediate_size"]),
        },
        "attention": {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
        },
    }


def expected_tensors(config: CheckpointConfig) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint by name, in the order of the model."""
    specs = dict(_language_model(config))
    specs.update(_projector(config))
    specs.update(_vision(config))
    return specs


def _language_model(config: CheckpointConfig) -> Iterator[tuple[str, TensorSpec]]:
    family = config.family
    vocabulary = TensorSpec((config.text["vocab_size"], config.hidden_size))
    yield f"{family.embeddings}.weight", vocabulary
    linears = language_model_linears(config)
    for layer in range(config.depth):
        prefix = family.layer_prefix(layer)
        yield f"{prefix}norm.weight", TensorSpec((config.hidden_size,))
        if config.mixer_kind(layer) == "mamba":
            yield from _mamba(config, f"{prefix}mixer.")
        for linear in linears:
            if linear.layer == layer:
                yield f"{linear.name}.weight", TensorSpec(linear.shape)
    yield f"{family.final_norm}.weight", TensorSpec((config.hidden_size,))
    yield f"{family.lm_head}.weight", vocabulary


def _mamba(config: CheckpointConfig, mixer: str) -> Iterator[tuple[str, TensorSpec]]:
    """The tensors of a Mamba-2 mixer besides its linears."""
    text = config.text
    heads = text["mamba_num_heads"]
    inner = heads * text["mamba_head_dim"]
    convolved = inner + 2 * text["n_groups"] * text["ssm_state_size"]
    for vector in ("A_log", "D", "dt_bias"):
        yield f"{mixer}{vector}", TensorSpec((heads,))
    yield f"{mixer}conv1d.weight", TensorSpec((convolved, 1, text["conv_kernel"]))
    if text.get("use_conv_bias", True):
        yield f"{mixer}conv1d.bias", TensorSpec((convolved,))
    yield f"{mixer}norm.weight", TensorSpec((inner,))


def _projector(config: CheckpointConfig) -> Iterator[tuple[str, TensorSpec]]:
    prefix = config.family.projector
    shuffle = round(1 / config.raw["downsample_ratio"]) ** 2
    shuffled = config.raw["vit_hidden_size"] * shuffle
    wide = config.raw["projector_hidden_size"]
    yield f"{prefix}0.weight", TensorSpec((shuffled,))
    yield f"{prefix}1.weight", TensorSpec((wide, shuffled))
    yield f"{prefix}3.weight", TensorSpec((config.hidden_size, wide))


def _vision(config: CheckpointConfig) -> Iterator[tuple[str, TensorSpec]]:
    tower = config.vision
    width = tower.hidden_size
    mlp = tower.mlp_size
    model = f"{config.family.vision}model."
    yield f"{model}patch_generator.cls_token.token", TensorSpec((tower.prefix_tokens, width))
    yield f"{model}patch_generator.embedder.weight", TensorSpec((width, 3 * tower.patch_size**2))
    yield f"{model}patch_generator.pos_embed", TensorSpec((1, tower.position_side**2, width))
    block = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (mlp, width),
        "mlp.fc1.bias": (mlp,),
        "mlp.fc2.weight": (width, mlp),
        "mlp.fc2.bias": (width,),
    }
    for layer in range(tower.layers):
        for name, shape in block.items():
            yield f"{model}blocks.{layer}.{name}", TensorSpec(shape)
    teachers = config.raw["vision_config"]["args"].get("teachers", [])
    summaries = [teacher for teacher in teachers if teacher.get("use_summary", True)]
    yield f"{config.family.vision}summary_idxs", TensorSpec((max(1, len(summaries)),), "I64")
