"""Runs the language model over calibration prompts, with exactly the embeddings of serving.

Tiles and frames go through the vision tower and the projector, EVS drops video tokens, and the rest
enters the language model as `inputs_embeds`. Prompts run one by one: padding would put activations
into the ranges that serving never has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from calibrate.evs import retention_mask
from calibrate.prompts import Prompt
from checkpoint.config import CheckpointConfig

if TYPE_CHECKING:
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3

TILES_AT_ONCE = 16
"""Tiles in one batch of the vision tower. 128 frames at once would need several GB beside the 12B.
"""

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
"""tqdm's own format, but always samples per second, never seconds per sample."""


@dataclass(frozen=True)
class Embedded:
    """A prompt as the language model receives it.

    Attributes:
        sample_id: The prompt's.
        token_ids: int64 [length], without pruned video tokens.
        inputs_embeds: [length, hidden] in the model's dtype, on its device.
        kept: bool [unpruned length], which of the prompt's tokens remain.
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
    """What a forward loop has run.

    Attributes:
        samples: Prompts.
        tokens: Their tokens, after EVS.
        video_tokens_kept: Visual tokens of videos among them.
        video_tokens_pruned: Visual tokens of videos that EVS dropped.
    """

    samples: int = 0
    tokens: int = 0
    video_tokens_kept: int = 0
    video_tokens_pruned: int = 0

    def plus(self, embedded: Embedded) -> Counts:
        """These counts with one more prompt."""
        one = Counts(
            1,
            len(embedded.token_ids),
            embedded.video_tokens_kept,
            embedded.video_tokens_pruned,
        )
        return self.plus_counts(one)

    def plus_counts(self, other: Counts) -> Counts:
        """The sum of both."""
        return Counts(
            self.samples + other.samples,
            self.tokens + other.tokens,
            self.video_tokens_kept + other.video_tokens_kept,
            self.video_tokens_pruned + other.video_tokens_pruned,
        )


@torch.no_grad()
def embed(model: NemotronH_Omni_Reasoning_V3, prompt: Prompt, config: CheckpointConfig) -> Embedded:
    """Embed one prompt; its clips are pruned at the rate of `prompt.video`.

    Args:
        model: From `checkpoint.native.load_model`.
        prompt: From `calibrate.prompts.build_prompt`.
        config: The checkpoint's.
    """
    rate = prompt.video.pruning_rate
    embeddings: nn.Module = model.get_input_embeddings()
    device = next(embeddings.parameters()).device
    ids = torch.tensor(prompt.token_ids, device=device)
    embeds = embeddings(ids)
    kept = torch.ones(len(ids), dtype=torch.bool, device=device)
    side = int(config.tokens_per_tile**0.5)
    video_tokens = 0
    for item in prompt.media:
        tiles = prompt.tiles[item.first_tile : item.first_tile + item.tiles]
        visual = tile_embeddings(model, tiles).flatten(0, 1)
        runs = [torch.arange(run.start, run.end, device=device) for run in item.visual]
        places = torch.cat(runs)
        embeds[places] = visual.to(embeds)
        if item.kind == "video":
            video_tokens += len(places)
            if rate > 0:
                mask = retention_mask(visual, item.tiles, side, side, rate)
                kept[places] = mask.to(device)
    pruned = int((~kept).sum())
    return Embedded(prompt.sample_id, ids[kept], embeds[kept], kept, video_tokens - pruned, pruned)


def embed_all(
    model: NemotronH_Omni_Reasoning_V3,
    prompts: Iterable[Prompt],
    config: CheckpointConfig,
    total: int | None = None,
) -> list[Embedded]:
    """Embed prompts for a calibration that runs over them several times; they are kept on the CPU.

    1,024 samples of 2,000 tokens are 21 GB at the 12B's width.

    Args:
        model: From `checkpoint.native.load_model`.
        prompts: The prompts.
        config: The checkpoint's.
        total: Number of prompts, for the progress bar.
    """
    kept = []
    for prompt in tqdm(prompts, "embed", total, unit="sample", disable=None):
        embedded = embed(model, prompt, config)
        kept.append(replace(embedded, inputs_embeds=embedded.inputs_embeds.cpu()))
    return kept


@torch.no_grad()
def tile_embeddings(model: NemotronH_Omni_Reasoning_V3, tiles: torch.Tensor) -> torch.Tensor:
    """Return the projector's output for normalized tiles.

    Whole tiles enter the tower as one dense batch: bit-equal to `get_image_features`, which packs
    them into one sequence and took 2.8 times as long for 16 tiles on a CPU. vLLM's own output
    differs by BF16 rounding.

    Args:
        model: From `checkpoint.native.load_model`.
        tiles: float32 [tiles, 3, size, size].

    Returns:
        [tiles, tokens, hidden] in the model's dtype.
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
    output = model.language_model(inputs_embeds=embedded.inputs_embeds[None], use_cache=False)
    return output.logits[0]


def forward_loop(
    model: NemotronH_Omni_Reasoning_V3,
    prompts: Iterable[Prompt | Embedded],
    config: CheckpointConfig,
    describe: str = "calibrate",
    total: int | None = None,
) -> Counts:
    """Run the language model over every prompt for its observers; the outputs are dropped.

    Args:
        model: In `eval()` mode; the quantizers of its language model observe the activations.
        prompts: Prompts, or embedded prompts for a calibration that runs over them several times.
        config: The checkpoint's.
        describe: Name on the progress bar, which is silent where stderr is not a terminal.
        total: Number of prompts, if `prompts` has no length.

    Returns:
        What was run.
    """
    counts = Counts()
    device = next(model.language_model.parameters()).device
    if total is None and isinstance(prompts, Sized):
        total = len(prompts)
    # Not inference_mode: ranges recorded under it would be inference tensors, which distillation
    # cannot train with.
    with torch.no_grad():
        for item, bar in _with_bar(prompts, describe, total):
            embedded = item if isinstance(item, Embedded) else embed(model, item, config)
            inputs = embedded.inputs_embeds[None].to(device)
            # Logits of the last position only: 132,096 float32 numbers per token are 17 GB at full
            # length.
            model.language_model(inputs_embeds=inputs, use_cache=False, logits_to_keep=1)
            counts = counts.plus(embedded)
            _show_rate(bar, counts.tokens)
    return counts


def _with_bar(
    items: Iterable[Prompt | Embedded], describe: str, total: int | None
) -> Iterator[tuple[Prompt | Embedded, tqdm]]:
    with tqdm(items, describe, total, unit="sample", disable=None, bar_format=BAR) as bar:
        for item in bar:
            yield item, bar


def _show_rate(bar: tqdm, tokens: int) -> None:
    if bar.disable:
        return
    elapsed = bar.format_dict["elapsed"]
    if elapsed:
        bar.set_postfix_str(f"{tokens / elapsed:,.0f} tokens/s", refresh=False)
