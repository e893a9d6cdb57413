"""Runs the language model over calibration prompts, with exactly the embeddings that serving would
give it.

Tiles and frames go through the vision tower and the projector, EVS drops video tokens, and the rest
enters the language model as `inputs_embeds`. Prompts run one by one: padding would put activations
into the ranges that serving never sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from calibrate.evs import check_rate, retention_mask
from calibrate.prompts import Prompt
from checkpoint.classes import NemotronH_Omni_Reasoning_V3
from checkpoint.config import CheckpointConfig

# Tiles through the vision tower at once. 128 frames in one batch would need several GB beside the
# 12B.
TILES_AT_ONCE = 16
# tqdm's own format, but always samples a second, never seconds a sample.
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


@dataclass(frozen=True)
class Embedded:
    """A prompt as the language model receives it.

    Attributes:
        sample_id: The prompt's.
        token_ids: int64 [length], pruned video tokens left out.
        inputs_embeds: [length, hidden] in the model's dtype, on its device.
        kept: bool [unpruned length], which of the prompt's tokens are left.
        video_tokens_kept: Visual tokens of videos that remain.
        video_tokens_pruned: Visual tokens of videos that EVS dropped.
    """

    sample_id: str
    token_ids: torch.Tensor
    inputs_embeds: torch.Tensor
    kept: torch.Tensor
    video_tokens_kept: int
    video_tokens_pruned: int


@dataclass(frozen=True)
class Counts:
    """What a forward loop went through."""

    samples: int
    tokens: int
    video_tokens_kept: int
    video_tokens_pruned: int


@torch.no_grad()
def embed(
    model: NemotronH_Omni_Reasoning_V3,
    prompt: Prompt,
    config: CheckpointConfig,
    pruning_rate: float = 0.0,
) -> Embedded:
    """Embed one prompt.

    Args:
        model: From `checkpoint.native.load_model`.
        prompt: Unpruned.
        config: The checkpoint's.
        pruning_rate: EVS rate q, 0 <= q < 1, of the videos; 0 prunes nothing.

    Raises:
        BadInput: The rate is out of range.
    """
    check_rate(pruning_rate)
    embeddings = model.get_input_embeddings()
    ids = torch.tensor(prompt.token_ids, device=next(embeddings.parameters()).device)
    embeds = embeddings(ids)
    kept = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    side = int(config.tokens_per_tile**0.5)
    video_tokens = 0
    for item in prompt.media:
        tiles = prompt.tiles[item.first_tile : item.first_tile + item.tiles]
        visual = tile_embeddings(model, tiles).flatten(0, 1)
        places = torch.cat(
            [torch.arange(run.start, run.end, device=ids.device) for run in item.visual]
        )
        embeds[places] = visual.to(embeds)
        if item.kind == "video":
            video_tokens += len(places)
            if pruning_rate > 0:
                kept[places] = retention_mask(visual, item.tiles, side, side, pruning_rate).to(
                    ids.device
                )
    pruned = int((~kept).sum())
    return Embedded(prompt.sample_id, ids[kept], embeds[kept], kept, video_tokens - pruned, pruned)


def embed_all(
    model: NemotronH_Omni_Reasoning_V3,
    prompts: Iterable[Prompt],
    config: CheckpointConfig,
    pruning_rate: float = 0.0,
    total: int | None = None,
) -> list[Embedded]:
    """Embed prompts for a calibration that passes over them several times; they are kept on the
    CPU.

    1,024 samples of 2,000 tokens are 21 GB at the 12B's width.
    """
    return [
        replace(embedded, inputs_embeds=embedded.inputs_embeds.cpu())
        for prompt in tqdm(prompts, "embed", total, unit="sample", disable=None)
        for embedded in [embed(model, prompt, config, pruning_rate)]
    ]


@torch.no_grad()
def tile_embeddings(model: NemotronH_Omni_Reasoning_V3, tiles: torch.Tensor) -> torch.Tensor:
    """Return the projector's output [tiles, tokens, hidden] for normalised tiles [tiles, 3, size,
    size].

    Whole tiles enter the tower as one dense batch: bit-equal to `get_image_features`, which packs
    them into one sequence and took 2.8 times as long for 16 tiles on a CPU. vLLM's own output
    differs by BF16 rounding.
    """
    weight = next(model.vision_model.parameters())
    side = tiles.shape[-1] // model.vision_model.patch_size
    parts = []
    for batch in tiles.split(TILES_AT_ONCE):
        features = model.vision_model(batch.to(weight.device, weight.dtype)).features
        parts.append(model.project_vision_features(features, side, side))
    return torch.cat(parts)


@torch.no_grad()
def logits(model: NemotronH_Omni_Reasoning_V3, embedded: Embedded) -> torch.Tensor:
    """Return the float32 logits [length, vocabulary] of every position of an embedded prompt."""
    return model.language_model(inputs_embeds=embedded.inputs_embeds[None], use_cache=False).logits[
        0
    ]


def forward_loop(
    model: NemotronH_Omni_Reasoning_V3,
    prompts: Iterable[Prompt | Embedded],
    config: CheckpointConfig,
    pruning_rate: float = 0.0,
    describe: str = "calibrate",
    total: int | None = None,
) -> Counts:
    """Run the language model over every prompt, for its observers' sake: the outputs are dropped.

    Args:
        model: In `eval()` mode, its language model with the quantizers that are to see the
            activations.
        prompts: Prompts, or prompts embedded before: a calibration that passes over the data
            several times embeds once.
        config: The checkpoint's.
        pruning_rate: EVS rate of the videos.
        describe: Name on the progress bar.
        total: How many prompts will come, where `prompts` cannot tell.

    Returns:
        What was run. The progress bar shows samples and tokens a second; it is silent where stderr
        is no terminal.
    """
    samples = tokens = kept = pruned = 0
    device = next(model.language_model.parameters()).device
    length = len(prompts) if total is None and isinstance(prompts, Sized) else total
    # Not inference_mode: ranges recorded under it would be inference tensors, which distillation
    # cannot train with.
    with (
        torch.no_grad(),
        tqdm(prompts, describe, length, unit="sample", disable=None, bar_format=BAR) as bar,
    ):
        for item in bar:
            embedded = (
                item if isinstance(item, Embedded) else embed(model, item, config, pruning_rate)
            )
            # The head at the last position only: 132,096 float32 logits a token are 17 GB at full
            # length.
            inputs = embedded.inputs_embeds[None].to(device)
            model.language_model(inputs_embeds=inputs, use_cache=False, logits_to_keep=1)
            samples += 1
            tokens += len(embedded.token_ids)
            kept += embedded.video_tokens_kept
            pruned += embedded.video_tokens_pruned
            elapsed = bar.format_dict["elapsed"] if not bar.disable else 0
            bar.set_postfix_str(
                f"{tokens / elapsed:,.0f} tokens/s" if elapsed else "", refresh=False
            )
    return Counts(samples, tokens, kept, pruned)
