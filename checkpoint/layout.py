"""The tensors a NemotronH_Nano_VL_V2 checkpoint must hold, computed from its config: names, shapes,
dtypes, linears.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from checkpoint.config import CheckpointConfig

LANGUAGE_MODEL = "language_model."
LAYERS = LANGUAGE_MODEL + "backbone.layers."

# vLLM's loader passes over the input conditioner, and nobody here has seen whether the release
# holds it.
OPTIONAL = (
    "vision_model.radio_model.input_conditioner.norm_mean",
    "vision_model.radio_model.input_conditioner.norm_std",
)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and safetensors dtype (`BF16`, `I64`, `F8_E4M3`, …) of one tensor."""

    shape: tuple[int, ...]
    dtype: str = "BF16"


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


_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1, "I64": 8}


def spec_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """Bytes of the tensors that `specs` describe."""
    return sum(_BYTES[spec.dtype] * math.prod(spec.shape) for spec in specs.values())


def plan_shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[list[str]]:
    """Tensor names by shard, in order, none over `shard_bytes` unless one tensor is."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        own = spec_bytes({name: spec})
        if shards[-1] and size + own > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    return shards


def language_model_linears(config: CheckpointConfig) -> list[Linear]:
    """Every linear layer of the language model's blocks, in order; not the embeddings, `lm_head` or
    `conv1d`.
    """
    text = config.text
    hidden, inner = text["hidden_size"], text["mamba_num_heads"] * text["mamba_head_dim"]
    groups = text["n_groups"] * text["ssm_state_size"]
    queries, keys = (
        text[key] * text["head_dim"] for key in ("num_attention_heads", "num_key_value_heads")
    )
    by_kind = {
        # Rows of in_proj: gate z, x, B, C and one step size dt a head.
        "mamba": {
            "in_proj": (2 * inner + 2 * groups + text["mamba_num_heads"], hidden),
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
    return [
        Linear(
            f"language_model.backbone.layers.{layer}.mixer.{name}",
            config.mixer_kind(layer),
            layer,
            shape,
        )
        for layer in range(len(config.pattern))
        for name, shape in by_kind[config.mixer_kind(layer)].items()
    ]


def expected_tensors(config: CheckpointConfig) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint by name, in the order of the model."""
    return dict(_language_model(config)) | dict(_projector(config)) | dict(_vision(config))


def _language_model(config: CheckpointConfig) -> Iterator[tuple[str, TensorSpec]]:
    text = config.text
    hidden, heads = text["hidden_size"], text["mamba_num_heads"]
    inner = heads * text["mamba_head_dim"]
    convolved = inner + 2 * text["n_groups"] * text["ssm_state_size"]
    yield "language_model.backbone.embeddings.weight", TensorSpec((text["vocab_size"], hidden))
    linears = language_model_linears(config)
    for layer in range(len(config.pattern)):
        prefix = f"language_model.backbone.layers.{layer}."
        yield prefix + "norm.weight", TensorSpec((hidden,))
        if config.mixer_kind(layer) == "mamba":
            for vector in ("A_log", "D", "dt_bias"):
                yield f"{prefix}mixer.{vector}", TensorSpec((heads,))
            yield prefix + "mixer.conv1d.weight", TensorSpec((convolved, 1, text["conv_kernel"]))
            if text.get("use_conv_bias", True):
                yield prefix + "mixer.conv1d.bias", TensorSpec((convolved,))
            yield prefix + "mixer.norm.weight", TensorSpec((inner,))
        for linear in linears:
            if linear.layer == layer:
                yield linear.name + ".weight", TensorSpec(linear.shape)
    yield "language_model.backbone.norm_f.weight", TensorSpec((hidden,))
    yield "language_model.lm_head.weight", TensorSpec((text["vocab_size"], hidden))


def _projector(config: CheckpointConfig) -> Iterator[tuple[str, TensorSpec]]:
    shuffled = config.raw["vit_hidden_size"] * round(1 / config.raw["downsample_ratio"]) ** 2
    wide = config.raw["projector_hidden_size"]
    yield "mlp1.0.weight", TensorSpec((shuffled,))
    yield "mlp1.1.weight", TensorSpec((wide, shuffled))
    yield "mlp1.3.weight", TensorSpec((config.text["hidden_size"], wide))


def _vision(config: CheckpointConfig) -> Iterator[tuple[str, TensorSpec]]:
    tower = config.vision
    width, mlp = tower.hidden_size, tower.mlp_size
    model = "vision_model.radio_model.model."
    yield model + "patch_generator.cls_token.token", TensorSpec((tower.prefix_tokens, width))
    yield model + "patch_generator.embedder.weight", TensorSpec((width, 3 * tower.patch_size**2))
    yield model + "patch_generator.pos_embed", TensorSpec((1, tower.position_side**2, width))
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
    summaries = [
        t
        for t in config.raw["vision_config"]["args"].get("teachers", [])
        if t.get("use_summary", True)
    ]
    yield "vision_model.radio_model.summary_idxs", TensorSpec((max(1, len(summaries)),), "I64")
