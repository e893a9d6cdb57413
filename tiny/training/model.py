"""What training needs of the native model: initial weights, embeddings of tiles, losses, EVS in a
batch, compiled element-wise operations, and the export.

The classes are those of transformers, so the trained model is the served one.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.models.radio.modeling_radio import RadioLayer
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from calibrate.evs import retained_tokens
from calibrate.sources.synthetic.drawing import COLORS
from checkpoint.atomic import write_tensors
from checkpoint.config import CheckpointConfig
from checkpoint.files import TensorFiles
from checkpoint.layout import expected_tensors
from checkpoint.libraries import language_model_classes
from checkpoint.opened import check_finite, open_bf16
from checkpoint.other_weights import SINGLE
from tiny.checkpoint import write_tiny
from tiny.training.labels import EMPTY, IGNORED, LABEL_SIZES, LINK_CLASSES, NAMES, RUNNING_TEXT

if TYPE_CHECKING:
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3

# Row and column offset, in patches, that each head of the first layers attends to at first.
_NEIGHBOURS = (
    ((0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (1, 1)),
    ((-1, 1), (1, -1), (0, -2), (0, 2), (0, -1), (0, 1)),
    ((0, -3), (0, 3), (0, -1), (0, 1)),
)


def without_layer_scale(model: NemotronH_Omni_Reasoning_V3) -> None:
    """Replace the layer scales of the tower, which the release does not have, by identities.

    They would be 1, but multiplying by a float32 parameter makes the tower's hidden states float32.
    """
    for layer in model.vision_model.encoder.layer:
        layer.layer_scale1 = nn.Identity()
        layer.layer_scale2 = nn.Identity()


@torch.no_grad()
def initialise(model: NemotronH_Omni_Reasoning_V3, seed: int) -> None:
    """Set the weights that training starts from.

    The last matrix of each block is 0, so that at first the output of the last layer is the input
    embeddings. The tower starts with what is true of any image: its position embeddings are sines
    and cosines of row and column, and the heads of its first layers attend to neighbours. From
    random weights it takes most of a short run until a patch finds the other patches of its glyph.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        _initialise_parameter(name, parameter, generator)
    for layer, offsets in zip(model.vision_model.encoder.layer, _NEIGHBOURS, strict=False):
        for head, (rows, cols) in enumerate(offsets):
            _attend_to(layer.attention, head, rows, cols)


def _initialise_parameter(name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    """Set one parameter. Those that are not named here (Mamba's decay and step size) stay as they
    are.
    """
    shape = parameter.shape
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    starts_at_one = last in ("D", "layer_norm") or "norm" in name
    if last in ("out_proj", "down_proj", "o_proj", "fc2"):
        parameter.zero_()
    elif last == "embeddings":
        parameter.copy_(torch.randn(shape, generator=generator))
    elif last == "lm_head":
        parameter.copy_(0.02 * torch.randn(shape, generator=generator))
    elif last == "position_embedding":
        parameter.copy_(_sines(shape[1], shape[2]))
    elif last == "cls_register_token":
        parameter.copy_(0.5 * torch.randn(shape, generator=generator))
    elif last == "bias" and "conv1d" not in name:
        parameter.zero_()
    elif parameter.ndim == 1 and starts_at_one:
        parameter.fill_(1.0)
    elif parameter.ndim == 3 and "conv1d" in name:
        parameter.copy_(torch.rand(shape, generator=generator) - 0.5)
    elif parameter.ndim == 2:
        scale = 0.5 if last == "patch_projection" else 1.0
        values = scale * torch.randn(shape, generator=generator)
        parameter.copy_(values / math.sqrt(shape[1]))


def _wave_lengths(count: int) -> torch.Tensor:
    """Return wave lengths of 2 to 64 patches, so that both neighbours and opposite edges differ."""
    return 2.0 * 32 ** (torch.arange(count) / (count - 1))


def _sines(patches: int, width: int) -> torch.Tensor:
    """Return position embeddings [1, patches, width]: sine and cosine of the row, then of the
    column.
    """
    side = int(patches**0.5)
    quarter = width // 4
    angle = torch.arange(side)[:, None] * (2 * math.pi / _wave_lengths(quarter))
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows = axis[:, None].expand(side, side, -1)
    cols = axis[None].expand(side, side, -1)
    return math.sqrt(2) * torch.cat([rows, cols], dim=-1).reshape(1, patches, width)


def _attend_to(attention: Any, head: int, rows: int, cols: int) -> None:
    """Set query and key of a head so that a patch attends to the one at an offset.

    The product of query and key is then a sum of cosines, which is largest at the offset.
    """
    width = attention.q_proj.weight.shape[0]
    size = attention.head_dim
    quarter = width // 4
    used = size // 4
    chosen = torch.linspace(0, quarter - 1, used).round().long()
    frequency = 2 * math.pi / _wave_lengths(quarter)[chosen]
    query = torch.zeros(size, width)
    key = torch.zeros(size, width)
    for axis, offset in enumerate((rows, cols)):
        sine = 2 * axis * quarter + chosen
        cosine = sine + quarter
        at_sine = 2 * axis * used + torch.arange(used)
        at_cosine = at_sine + used
        turn = frequency * offset
        key[at_sine, sine] = 1.0
        key[at_cosine, cosine] = 1.0
        query[at_sine, sine] = turn.cos()
        query[at_sine, cosine] = turn.sin()
        query[at_cosine, cosine] = turn.cos()
        query[at_cosine, sine] = -turn.sin()
    rows_of_head = slice(head * size, (head + 1) * size)
    attention.q_proj.weight[rows_of_head] = 1.8 * query
    attention.k_proj.weight[rows_of_head] = 1.8 * key


def tile_embeddings(
    model: NemotronH_Omni_Reasoning_V3, config: CheckpointConfig, tiles: torch.Tensor
) -> torch.Tensor:
    """Return the embeddings of tiles, as the projector gives them to the language model.

    Args:
        model: The model.
        config: Its configuration.
        tiles: uint8 [tiles, side, side, 3], of the tile size.

    Returns:
        [tiles, tokens, hidden].
    """
    values = tiles.permute(0, 3, 1, 2).float()
    mean = _channels(tuple(config.raw["norm_mean"]), tiles.device)
    deviation = _channels(tuple(config.raw["norm_std"]), tiles.device)
    normalised = ((values / 255.0 - mean) / deviation).bfloat16()
    features = model.vision_model(normalised).features
    side = config.tile_size // config.raw["patch_size"]
    return model.project_vision_features(features, side, side)


@lru_cache
def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return one value per channel; cached, because a CUDA graph cannot copy from the host."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def dense_losses(
    predicted: torch.Tensor, alike: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the loss of naming the glyphs in the four patches of every visual token.

    It teaches reading from a whole page at once, not only from the tokens of an answer.

    Args:
        predicted: [tiles, tokens, 4 x sum(LABEL_SIZES)]: scores of the classes of each patch.
        alike: [tiles, tokens, NAMES]: similarity to the embeddings of the names. With this loss,
            what the language model learns about copying from lists holds for pages too.
        labels: uint8 [tiles, patches, patches, 3].

    Returns:
        float32 [3]: the loss; the share of readable glyphs that are named correctly; the share of
        the tokens with one name that are most similar to its embedding.
    """
    # The four patches of a token one after the other: [patches of all tiles, 3].
    side = labels.shape[1] // 2
    by_token = labels.reshape(-1, side, 2, side, 2, 3).permute(0, 1, 3, 2, 4, 5)
    wanted = by_token.reshape(-1, 3).long()
    patches = predicted.float().reshape(-1, sum(LABEL_SIZES))
    label_loss, named = _label_loss(patches.split(LABEL_SIZES, dim=-1), wanted)
    name_loss, matched = _name_loss(alike.float().flatten(0, 1), wanted)
    return torch.stack([label_loss + 0.5 * name_loss, named, matched])


def _label_loss(
    scores: tuple[torch.Tensor, ...], wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of the three labels of each patch, and the share of glyphs named correctly.

    Args:
        scores: For each label, float32 [patches, classes].
        wanted: int64 [patches, 3].
    """
    glyph = wanted[:, 0]
    is_readable = (glyph > RUNNING_TEXT) & (glyph != IGNORED)
    # Nine patches in ten are empty.
    weight = torch.where(glyph == EMPTY, 0.05, 1.0) * (glyph != IGNORED)
    loss = glyph.new_zeros((), dtype=torch.float32)
    for column, scores_of_label in enumerate(scores):
        # Position and link mean something in words only.
        label_weight = weight if column == 0 else weight * is_readable
        each = nn.functional.cross_entropy(
            scores_of_label, wanted[:, column], ignore_index=IGNORED, reduction="none"
        )
        loss = loss + (each * label_weight).sum() / label_weight.sum().clamp(min=1.0)
    is_right = (scores[0].argmax(-1) == glyph) * is_readable
    return loss, is_right.sum() / is_readable.sum().clamp(min=1)


def _name_loss(alike: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each token's similarity to the names in it, and how many match.

    Args:
        alike: float32 [tokens, NAMES].
        wanted: int64 [4 x tokens, 3]: the labels of the patches.
    """
    glyph = wanted[:, :1]
    link = wanted[:, 2:]
    colors = torch.arange(len(COLORS), device=alike.device)
    glyphs = torch.arange(len(NAMES) - len(COLORS), device=alike.device)
    first_color = LINK_CLASSES[NAMES[-len(COLORS)]]
    has_glyph = glyph - (RUNNING_TEXT + 1) == glyphs
    # The colour of the glyph, or of the box that it is drawn on.
    has_color = (link - first_color == colors) & has_glyph.any(1, keepdim=True)
    has_name = torch.cat([has_glyph, has_color], dim=1)
    names = has_name.reshape(-1, 4, len(NAMES)).sum(1).float()
    count = names.sum(1)
    likelihood = alike.log_softmax(-1)
    each = -(likelihood * names).sum(-1) / count.clamp(min=1.0)
    loss = each.sum() / (count > 0).sum().clamp(min=1)
    has_one = count == 1
    is_right = (likelihood.argmax(-1) == names.argmax(-1)) * has_one
    return loss, is_right.sum() / has_one.sum().clamp(min=1)


def text_loss(logits: torch.Tensor, following: torch.Tensor, visual_id: int) -> torch.Tensor:
    """Return the mean cross-entropy of text tokens, without visual tokens and padding (0).

    Args:
        logits: float32 [items, length, vocabulary].
        following: int64 [items, length]: the next token at each position.
        visual_id: The token that every visual token has.
    """
    is_text = ((following != 0) & (following != visual_id)).float()
    each = nn.functional.cross_entropy(logits.transpose(1, 2), following, reduction="none")
    return (each * is_text).sum() / is_text.sum()


def without_pruned(
    visual: torch.Tensor, places: torch.Tensor, length: int, items: int, rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tokens EVS keeps, as `calibrate.evs.retention_mask` does, for a batch of clips.

    Args:
        visual: Projector output [frames of all items, tokens per frame, hidden]; all items have
            equally many frames.
        places: int64 [visual tokens]: their positions in the flattened items.
        length: Tokens per item.
        items: Number of items.
        rate: The pruning rate.

    Returns:
        Indices [items, kept] of the tokens that are kept, in order, and int64 [items, length]: the
        new position of each token.
    """
    per_frame = visual.shape[1]
    clips = visual.bfloat16().reshape(items, -1, per_frame, visual.shape[-1])
    frames = clips.shape[1]
    similarity = nn.functional.cosine_similarity(clips[:, 1:], clips[:, :-1], dim=-1)
    # EVS keeps the first frame whole: no change scores higher than 2.
    first_frame = torch.full_like(similarity[:, :1], 255.0)
    scores = torch.cat([first_frame, 1 - similarity], dim=1).reshape(items, -1)
    budget = retained_tokens(frames, per_frame, rate)
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :budget]
    is_retained = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
    is_kept = torch.ones(items * length, dtype=torch.bool, device=places.device)
    is_kept = is_kept.index_copy(0, places, is_retained.flatten()).view(items, length)
    # A stable sort puts the kept tokens first, in their order; their number is the same everywhere.
    order = is_kept.int().argsort(dim=-1, descending=True, stable=True)
    kept = length - frames * per_frame + budget
    return order[:, :kept], is_kept.cumsum(1) - 1


def fuse_elementwise() -> None:
    """Compile what would be dozens of small kernels per layer: the layers of the tower,
    convolutions, norms and squared ReLU.

    This replaces methods of transformers' classes in this process. The norms return BF16 here, as
    they do when the model is served.
    """
    classes = language_model_classes()
    classes.causal_conv1d_fn = torch.compile(_convolved, dynamic=True)
    forwards: dict[type, Callable[..., Any]] = {
        Zamba2RMSNormGated: _gated_norm,
        classes.NemotronHRMSNorm: _norm,
        classes.NemotronHMLP: classes.NemotronHMLP.forward,
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
    """Return a causal depthwise convolution, followed by SiLU.

    Args:
        hidden_states: [items, channels, length].
        weight: [channels, width].
        bias: [channels].
        activation: Always SiLU in this model.
    """
    length = hidden_states.shape[-1]
    width = weight.shape[1]
    padded = nn.functional.pad(hidden_states.transpose(1, 2), (0, 0, width - 1, 0)).float()
    total = bias.float()
    for tap in range(width):
        total = total + padded[:, tap : tap + length] * weight[:, tap]
    return nn.functional.silu(total).to(hidden_states.dtype).transpose(1, 2)


def save_released(model: NemotronH_Omni_Reasoning_V3, config: CheckpointConfig, out: Path) -> None:
    """Write the model in the released layout, in BF16, with config, tokenizer and chat template.

    `model` itself is rounded to BF16, so that a later evaluation measures what was written.

    Args:
        model: The trained model.
        config: Its configuration.
        out: Directory to write; it is replaced if it exists.
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
        write_tensors(out / SINGLE, tensors)
    check_finite(open_bf16(out))
