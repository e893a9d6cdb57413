"""How many sequences fit: weights, one step, KV cache and Mamba states against a GPU's memory.

vLLM puts attention and Mamba layers into one pool of blocks. Each block belongs to a group of
layers of one kind: a sequence takes a block for every `block_tokens` tokens from the group of the
attention layers, and one block, whatever its length, from each group of Mamba layers. A block is as
large as the state of a group of Mamba layers, so that it holds more than a thousand tokens
(vllm/platforms/interface.py, vllm/v1/core/kv_cache_utils.py). A test holds the numbers to what vLLM
reports: tests/serve/test_sequences_that_fit.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from checkpoint.config import CheckpointConfig, is_quantized
from checkpoint.reading import safetensors_header
from serve.environment import Device

GB = 1e9

GPU_ALIGNMENT = 16
CPU_ALIGNMENT = 128
"""Tokens that the size of a block is a multiple of: vLLM's own block size there."""

DEFAULT_UTILIZATION = 0.92
"""Share of a GPU's memory that vLLM takes (vllm/config/cache.py, 0.32 and 0.33)."""

DEFAULT_SEQUENCES = 256
"""Sequences that vLLM runs at once at most on a GPU below `LARGE_GPU`. The logits of a step are
counted for this number."""

MOST_SEQUENCES = 1024
"""The same on larger GPUs (vllm/engine/arg_utils.py, 0.32 and 0.33)."""

LARGE_GPU = 70 * 2**30
"""Bytes."""

CUDA_BYTES = 0.6 * GB
"""CUDA context and libraries. An estimate."""

GROWTH_AS_FP8 = 0.875
"""Bytes that a byte of FP4 weights grows by when it becomes FP8: two bytes take its place, and that
of an eighth of a byte of block scales."""

BF16 = 2
_FLOAT32 = 4


@dataclass(frozen=True)
class Cache:
    """What sequences take of the pool.

    Attributes:
        token_bytes: KV cache of one token, in all attention layers of one rank.
        sequence_bytes: State of one sequence, in all Mamba layers of one rank.
        block_tokens: Tokens that one block of the attention layers holds.
        block_bytes: Size of a block.
        state_blocks: Blocks that a sequence takes for its Mamba states.
    """

    token_bytes: int
    sequence_bytes: int
    block_tokens: int
    block_bytes: int
    state_blocks: int

    def sequences(self, pool_bytes: float, length: int) -> float:
        """Return how many sequences of `length` tokens fit into a pool, as vLLM reports it."""
        blocks = pool_bytes // self.block_bytes
        per_sequence = math.ceil(length / self.block_tokens) + self.state_blocks
        return blocks / per_sequence

    def longest(self, pool_bytes: float) -> int:
        """Return how long one sequence can be; 0 when none fits."""
        blocks = int(pool_bytes // self.block_bytes)
        return max(0, blocks - self.state_blocks) * self.block_tokens


def cache_of(
    config: CheckpointConfig,
    ranks: int = 1,
    alignment: int = GPU_ALIGNMENT,
    value_bytes: int = BF16,
    kv_bytes: int | None = None,
    ring_tokens: int = 0,
    state_bytes: int = _FLOAT32,
) -> Cache:
    """Return what sequences take of one rank's pool.

    Args:
        config: A checkpoint's.
        ranks: GPUs that the model is split over.
        alignment: Tokens that the size of a block is a multiple of.
        value_bytes: Bytes of a value that the model computes with, as in the convolution's state.
        kv_bytes: Bytes of a value of the KV cache; `value_bytes` when None.
        ring_tokens: Tokens that are kept beside each state: ReplaySSM's.
        state_bytes: Bytes of a value of the Mamba state.
    """
    text = config.text
    heads = max(1, text["num_key_value_heads"] // ranks)
    layer_token = 2 * heads * text["head_dim"] * (kv_bytes or value_bytes)
    # The Mamba mixer's input x, and its B, which has the size of C. vLLM copies groups so that each
    # rank has one.
    x_values = text["mamba_num_heads"] * text["mamba_head_dim"]
    b_values = max(text["n_groups"], ranks) * text["ssm_state_size"]
    state = x_values * text["ssm_state_size"] * state_bytes
    convolution = (x_values + 2 * b_values) * (text["conv_kernel"] - 1) * value_bytes
    # Of each token x and B, and of each head its step in float32.
    kept = (x_values + b_values) * value_bytes + text["mamba_num_heads"] * _FLOAT32
    ring = ring_tokens * kept
    layer_state = (state + convolution + ring) // ranks
    block_tokens = alignment * math.ceil(layer_state / (alignment * layer_token))

    attention_layers = config.pattern.count("*")
    mamba_layers = config.pattern.count("M")
    group = _layers_of_a_group(attention_layers, mamba_layers)
    return Cache(
        token_bytes=attention_layers * layer_token,
        sequence_bytes=mamba_layers * layer_state,
        block_tokens=block_tokens,
        block_bytes=group * block_tokens * layer_token,
        state_blocks=math.ceil(mamba_layers / group),
    )


def _layers_of_a_group(attention_layers: int, mamba_layers: int) -> int:
    fewest = min(attention_layers, mamba_layers)
    most = max(attention_layers, mamba_layers)
    return most if most < 1.5 * fewest else fewest


@dataclass(frozen=True)
class MemoryPlan:
    """A GPU's memory, in bytes, for one rank.

    Attributes:
        allowed: What vLLM may take.
        weights: The checkpoint's tensors.
        step: Activations of the largest step, of language model or vision tower, and CUDA's own.
    """

    allowed: float
    weights: float
    step: float

    @property
    def pool(self) -> float:
        """What is left for sequences; negative when the rest does not fit."""
        return self.allowed - self.weights - self.step


def plan_memory(
    config: CheckpointConfig,
    device: Device,
    step_tokens: int,
    frames: int,
    ranks: int = 1,
    utilization: float | None = None,
    is_fp4_converted: bool = False,
) -> MemoryPlan:
    """Return how a GPU's memory is divided.

    Args:
        config: A checkpoint's.
        device: Whose smallest GPU decides.
        step_tokens: Tokens of the largest step.
        frames: Most frames of a clip, which the tower sees at once.
        ranks: GPUs that the model is split over.
        utilization: Share of the memory that vLLM may take; vLLM's default when None.
        is_fp4_converted: Whether NVFP4 weights become FP8.
    """
    allowed = device.memory * (utilization or DEFAULT_UTILIZATION)
    weights = weight_bytes(config)
    if is_fp4_converted:
        weights += int(GROWTH_AS_FP8 * packed_bytes(config.directory))
    weights //= ranks
    step = max(_step_of_language(config, step_tokens), _step_of_tower(config, frames))
    logits = DEFAULT_SEQUENCES * config.text["vocab_size"] * 2 * _FLOAT32
    return MemoryPlan(allowed, weights, step + logits + CUDA_BYTES)


def weight_bytes(config: CheckpointConfig) -> int:
    """Return the size of a checkpoint's weights in memory: that of its files, but of a model that
    is not quantized, vLLM rounds what they hold in float32.

    Raises:
        OSError, ValueError, struct.error: A file is not a safetensors file.
    """
    paths = list(config.directory.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in paths)
    if is_quantized(config.raw):
        return total
    return total - sum(_tensor_bytes(path, "F32") // 2 for path in paths)


def packed_bytes(directory: Path) -> int:
    """Return the size of a checkpoint's packed FP4 weights, from the files' headers.

    Raises:
        OSError, ValueError, struct.error: A file is not a safetensors file.
    """
    return sum(_tensor_bytes(path, "U8") for path in directory.glob("*.safetensors"))


def _tensor_bytes(path: Path, dtype: str) -> int:
    """Bytes of the tensors of one dtype in a file."""
    header, _ = safetensors_header(path)
    header.pop("__metadata__", None)
    total = 0
    for entry in header.values():
        if entry["dtype"] == dtype:
            begin, end = entry["data_offsets"]
            total += end - begin
    return total


def _step_of_language(config: CheckpointConfig, tokens: int) -> float:
    """Activations of a step in its widest layer: residual stream in and out, and what the layer
    holds inside.
    """
    text = config.text
    channels = text["mamba_num_heads"] * text["mamba_head_dim"]
    states = 2 * text["n_groups"] * text["ssm_state_size"]
    inside = max(2 * text["intermediate_size"], 3 * channels + 2 * states)
    return tokens * (3 * text["hidden_size"] + inside) * BF16


def _step_of_tower(config: CheckpointConfig, frames: int) -> float:
    """Activations of the tower over a clip: pixels, and the widest part of a block."""
    tower = config.vision
    side = config.tile_size // tower.patch_size
    patches = frames * (side * side + tower.prefix_tokens)
    pixels = frames * 3 * config.tile_size**2
    inside = max(2 * tower.mlp_size, 4 * tower.hidden_size)
    return (pixels + patches * (3 * tower.hidden_size + inside)) * BF16
