"""The native model under training: initial weights, tiles to embeddings, EVS in a batch,
element-wise steps fused.

Everything here leaves the transformers classes as they are, so what is trained is what is served.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.models.radio.modeling_radio import RadioLayer
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from calibrate.evs import retained_tokens
from calibrate.sources.synthetic.drawing import COLORS
from checkpoint.classes import NemotronH_Omni_Reasoning_V3
from checkpoint.classes import modeling as native
from checkpoint.config import CheckpointConfig
from checkpoint.files import SINGLE, TensorFiles, check_weights
from checkpoint.layout import expected_tensors
from tiny.checkpoint import write_tiny
from tiny.training.data import IGNORED, LABEL_SIZES, LINK_CLASSES, NAMES


def without_layer_scale(model: NemotronH_Omni_Reasoning_V3) -> None:
    """Take the layer scales out: the release has none, and multiplying by 1 turns the tower's
    stream to float32.
    """
    for layer in model.vision_model.encoder.layer:
        layer.layer_scale1, layer.layer_scale2 = nn.Identity(), nn.Identity()


@torch.no_grad()
def initialise(model: NemotronH_Omni_Reasoning_V3, seed: int) -> None:
    """Weights to start from: each block's last matrix 0, so that the residual stream begins as the
    embeddings.

    The tower begins with what an image has anyway: its position table is sines and cosines of row
    and column, and the heads of its first layers look at neighbours. Left to chance, it takes most
    of a short run until a patch can find the other patches of its glyph.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        last = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if last in ("out_proj", "down_proj", "o_proj", "fc2"):
            parameter.zero_()
        elif last == "embeddings":
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        elif last == "lm_head":
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        elif last == "position_embedding":
            parameter.copy_(_sines(parameter.shape[1], parameter.shape[2]))
        elif last == "cls_register_token":
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        elif last == "bias" and "conv1d" not in name:
            parameter.zero_()
        elif parameter.ndim == 1 and (last in ("D", "layer_norm") or "norm" in name):
            parameter.fill_(1.0)
        elif parameter.ndim == 3 and "conv1d" in name:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
        elif parameter.ndim == 2:
            scale = 0.5 if last == "patch_projection" else 1.0
            parameter.copy_(
                scale
                * torch.randn(parameter.shape, generator=generator)
                / math.sqrt(parameter.shape[1])
            )
    for layer, offsets in zip(model.vision_model.encoder.layer, _NEIGHBOURS, strict=False):
        for head, (rows, cols) in enumerate(offsets):
            _look_at(layer.attention, head, rows, cols)


# Row and column offset, in patches, that each head of the first layers looks at to begin with.
_NEIGHBOURS = (
    ((0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (1, 1)),
    ((-1, 1), (1, -1), (0, -2), (0, 2), (0, -1), (0, 1)),
    ((0, -3), (0, 3), (0, -1), (0, 1)),
)


def _wave_lengths(count: int) -> torch.Tensor:
    """Of 2 to 64 patches: neighbours differ, and so do opposite edges."""
    return 2.0 * 32 ** (torch.arange(count) / (count - 1))


def _sines(patches: int, width: int) -> torch.Tensor:
    side, quarter = int(patches**0.5), width // 4
    angle = torch.arange(side)[:, None] * (2 * math.pi / _wave_lengths(quarter))
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, cols = axis[:, None].expand(side, side, -1), axis[None].expand(side, side, -1)
    return math.sqrt(2) * torch.cat([rows, cols], dim=-1).reshape(1, patches, width)


def _look_at(attention: Any, head: int, rows: int, cols: int) -> None:
    """Set a head's query and key so that their product is a sum of cosines that peaks at the
    offset.
    """
    width, size = attention.q_proj.weight.shape[0], attention.head_dim
    quarter, used = width // 4, size // 4
    chosen = torch.linspace(0, quarter - 1, used).round().long()
    frequency = 2 * math.pi / _wave_lengths(quarter)[chosen]
    query, key = torch.zeros(size, width), torch.zeros(size, width)
    for axis, offset in enumerate((rows, cols)):
        sine = 2 * axis * quarter + chosen
        cosine = sine + quarter
        at_sine = 2 * axis * used + torch.arange(used)
        at_cosine = at_sine + used
        turn = frequency * offset
        key[at_sine, sine], key[at_cosine, cosine] = 1.0, 1.0
        query[at_sine, sine], query[at_sine, cosine] = turn.cos(), turn.sin()
        query[at_cosine, cosine], query[at_cosine, sine] = turn.cos(), -turn.sin()
    rows_of_head = slice(head * size, (head + 1) * size)
    attention.q_proj.weight[rows_of_head] = 1.8 * query
    attention.k_proj.weight[rows_of_head] = 1.8 * key


def tile_embeddings(
    model: NemotronH_Omni_Reasoning_V3, config: CheckpointConfig, tiles: torch.Tensor
) -> torch.Tensor:
    """Projector output [tiles, tokens, hidden] of uint8 tiles [tiles, side, side, 3] of the tile
    size.
    """
    values = tiles.permute(0, 3, 1, 2).float()
    mean, deviation = (
        _channels(tuple(config.raw[key]), tiles.device) for key in ("norm_mean", "norm_std")
    )
    features = model.vision_model(((values / 255.0 - mean) / deviation).bfloat16()).features
    side = config.tile_size // config.raw["patch_size"]
    return model.project_vision_features(features, side, side)


@lru_cache
def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Kept, because a CUDA graph cannot copy from the host."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def dense_losses(
    predicted: torch.Tensor, alike: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Loss of every visual token naming the glyphs in its four patches: reading is learned from a
    whole page at once.

    Args:
        predicted: [tiles, tokens, 4 x the classes of `LABEL_SIZES`].
        alike: [tiles, tokens, `NAMES`]: likeness to the names' own embeddings. With it, what the
            language model learns of copying from lists holds for pages too.
        labels: uint8 [tiles, patches, patches, 3].

    Returns:
        float32 [3]: the loss; share of the glyphs to be read that are named rightly; share of the
        tokens with one name that are most like its embedding.
    """
    side = labels.shape[1] // 2
    wanted = labels.reshape(-1, side, 2, side, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, 3).long()
    glyph = wanted[:, 0]
    # Nine patches in ten are empty; place and link say something of words only.
    weight = torch.where(glyph == 0, 0.05, 1.0) * (glyph != IGNORED)
    total = predicted.new_zeros((), dtype=torch.float32)
    heads = predicted.float().reshape(-1, sum(LABEL_SIZES)).split(LABEL_SIZES, dim=-1)
    read = (glyph > 1) & (glyph != IGNORED)
    for column, scores in enumerate(heads):
        mine = weight if column == 0 else weight * read
        each = nn.functional.cross_entropy(
            scores, wanted[:, column], ignore_index=IGNORED, reduction="none"
        )
        total = total + (each * mine).sum() / mine.sum().clamp(min=1.0)
    named = ((heads[0].argmax(-1) == glyph) * read).sum() / read.sum().clamp(min=1)
    glyphs, colors = (
        torch.arange(n, device=glyph.device) for n in (len(NAMES) - len(COLORS), len(COLORS))
    )
    named_glyph = glyph[:, None] - 2 == glyphs
    # The colour that the glyph has or stands on.
    named_color = (wanted[:, 2:] - LINK_CLASSES[NAMES[-len(COLORS)]] == colors) & named_glyph.any(
        1, keepdim=True
    )
    held = torch.cat([named_glyph, named_color], dim=1).reshape(-1, 4, len(NAMES)).sum(1).float()
    likeness = alike.float().flatten(0, 1).log_softmax(-1)
    each = -(likeness * held).sum(-1) / held.sum(1).clamp(min=1.0)
    total = total + 0.5 * each.sum() / (held.sum(1) > 0).sum().clamp(min=1)
    single = held.sum(1) == 1
    matched = ((likeness.argmax(-1) == held.argmax(-1)) * single).sum() / single.sum().clamp(min=1)
    return torch.stack([total, named, matched])


def text_loss(logits: torch.Tensor, following: torch.Tensor, visual_id: int) -> torch.Tensor:
    """Mean cross-entropy of a text's tokens, without what stands for pictures and the padding (0).

    Args:
        logits: float32 [items, length, vocabulary].
        following: int64 [items, length]: the token that each predicts.
        visual_id: The token that stands for a visual one.
    """
    text = ((following != 0) & (following != visual_id)).float()
    each = nn.functional.cross_entropy(logits.transpose(1, 2), following, reduction="none")
    return (each * text).sum() / text.sum()


def without_pruned(
    visual: torch.Tensor, places: torch.Tensor, length: int, items: int, rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What EVS leaves of clips with equally many frames, as `calibrate.evs.retention_mask`, for a
    batch.

    Args:
        visual: Projector output [frames of all items, tokens of a frame, hidden].
        places: int64 [visual tokens]: where they stand in the flattened items.
        length: Tokens of an item.
        items: How many items.
        rate: The pruning rate.

    Returns:
        Indices [items, kept] of the tokens that are left, in order, and int64 [items, length]: the
        new place of each.
    """
    each = visual.shape[1]
    clips = visual.bfloat16().reshape(items, -1, each, visual.shape[-1])
    frames = clips.shape[1]
    same = nn.functional.cosine_similarity(clips[:, 1:], clips[:, :-1], dim=-1)
    scores = torch.cat([torch.full_like(same[:, :1], 255.0), 1 - same], dim=1).reshape(items, -1)
    budget = retained_tokens(frames, each, rate)
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :budget]
    retained = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
    kept = torch.ones(items * length, dtype=torch.bool, device=places.device)
    kept = kept.index_copy(0, places, retained.flatten()).view(items, length)
    order = kept.int().argsort(dim=-1, descending=True, stable=True)
    return order[:, : length - frames * each + budget], kept.cumsum(1) - 1


def fuse_elementwise() -> None:
    """Compile what would be dozens of small kernels a layer: the tower's layers, convolution,
    norms, ReLU squared.

    The norms give BF16 here, as they do when the model is served.
    """
    native.causal_conv1d_fn = torch.compile(_convolved, dynamic=True)  # type: ignore[assignment]
    forwards: dict[type, Callable[..., Any]] = {
        Zamba2RMSNormGated: _gated_norm,
        native.NemotronHRMSNorm: _norm,
        native.NemotronHMLP: native.NemotronHMLP.forward,
        RadioLayer: RadioLayer.forward,
    }
    for kind, forward in forwards.items():
        kind.forward = torch.compile(forward, dynamic=True)  # type: ignore[attr-defined]


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    values = hidden_states.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return (self.weight * values).bfloat16()


def _gated_norm(self: Any, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    values = hidden_states.float() * nn.functional.silu(gate.float())
    grouped = values.unflatten(-1, (-1, self.group_size))
    grouped = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return (self.weight * grouped.flatten(-2)).bfloat16()


def _convolved(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str, **_: Any
) -> Any:
    """Causal depthwise convolution and SiLU: [items, channels, length], weight [channels, width]."""
    length = hidden_states.shape[-1]
    padded = nn.functional.pad(
        hidden_states.transpose(1, 2), (0, 0, weight.shape[1] - 1, 0)
    ).float()
    total = bias.float()
    for tap in range(weight.shape[1]):
        total = total + padded[:, tap : tap + length] * weight[:, tap]
    return nn.functional.silu(total).to(hidden_states.dtype).transpose(1, 2)


def save_released(model: NemotronH_Omni_Reasoning_V3, config: CheckpointConfig, out: Path) -> None:
    """Round the model to BF16 and write it under the released names, with config, tokenizer and
    template beside it.

    `model` is rounded too, so that what is evaluated afterwards is what was written.
    """
    shutil.rmtree(out, ignore_errors=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    write_tiny(out, trained=False)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        written = TensorFiles(scratch)
        tensors = {}
        for name, spec in expected_tensors(config).items():
            tensor = written.read(name)
            tensors[name] = tensor if spec.dtype == "I64" else tensor.to(torch.bfloat16)
        partial = out / f".{SINGLE}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(out / SINGLE)
    (out / SINGLE).chmod(0o644)
    check_weights(CheckpointConfig(out, config.raw))
