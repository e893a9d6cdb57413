"""Greedy answers in process: prompts of equal length are decoded together, nothing is padded."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from calibrate.forward import Embedded, embed
from calibrate.prompts import build_prompt
from calibrate.samples import Sample
from checkpoint.config import CheckpointConfig
from checkpoint.log import get_logger
from checkpoint.opened import Checkpoint
from checkpoint.products import float32_products
from checkpoint.video import Video
from export.load import load_exported

if TYPE_CHECKING:
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3

logger = get_logger(__name__)

MAX_ANSWER_TOKENS = 24
_EMBEDDED_AT_ONCE = 64
"""Prompts embedded before the first of them is decoded, to find equal lengths among."""
_BATCH_TOKENS = 8192

Numbered = tuple[int, Embedded]
"""An embedded prompt with its place among the samples."""


@torch.no_grad()
@float32_products()
def generate(
    model: NemotronH_Omni_Reasoning_V3,
    config: CheckpointConfig,
    tokenizer: PreTrainedTokenizerFast,
    samples: Sequence[Sample],
    video: Video,
    describe: str = "answering",
) -> list[str]:
    """Answer every sample greedily, with up to 24 tokens.

    Args:
        model: BF16, or read back from an export.
        config: The checkpoint's.
        tokenizer: The checkpoint's.
        samples: Without an assistant's turn at the end.
        video: How clips are sampled and pruned.
        describe: Name on the progress bar.

    Returns:
        Answers without special tokens, in the order of `samples`.

    Raises:
        BadInput: A prompt cannot be built.
    """
    answers: dict[int, str] = {}
    end = config.text["eos_token_id"]

    def embedded() -> Iterator[Numbered]:
        for number, sample in enumerate(samples):
            prompt = build_prompt(sample, config, tokenizer, video)
            yield number, embed(model, prompt, config)

    with tqdm(
        total=len(samples), desc=describe, unit="item", leave=False, disable=None
    ) as progress:
        for batch in _equal_lengths(embedded()):
            inputs = torch.stack([item.inputs_embeds for _, item in batch])
            tokens = _decode(model.language_model, inputs, end)
            for (number, _), row in zip(batch, tokens, strict=True):
                answers[number] = str(tokenizer.decode(row, skip_special_tokens=True))
            progress.update(len(batch))
    return [answers[number] for number in range(len(samples))]


def _decode(language_model: nn.Module, inputs_embeds: torch.Tensor, end: int) -> torch.Tensor:
    """Greedy tokens [batch, up to 24].

    transformers 5.19 has no `generate` from embeddings for this language model.
    """
    output = language_model(inputs_embeds=inputs_embeds, use_cache=True, logits_to_keep=1)
    tokens = [output.logits[:, -1].argmax(-1)]
    ended = tokens[0] == end
    while len(tokens) < MAX_ANSWER_TOKENS and not bool(ended.all()):
        output = language_model(
            input_ids=tokens[-1][:, None],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        following = output.logits[:, -1].argmax(-1)
        tokens.append(torch.where(ended, end, following))
        ended |= following == end
    return torch.stack(tokens, dim=1)


def _equal_lengths(items: Iterable[Numbered]) -> Iterator[list[Numbered]]:
    """Yield batches of prompts of one length.

    Mamba's state has no mask for padding, and activations are what is measured.
    """
    iterator = iter(items)
    while True:
        ahead = list(itertools.islice(iterator, _EMBEDDED_AT_ONCE))
        if not ahead:
            return
        groups: dict[int, list[Numbered]] = {}
        for item in ahead:
            groups.setdefault(len(item[1].token_ids), []).append(item)
        for length, group in groups.items():
            size = max(1, _BATCH_TOKENS // length)
            for start in range(0, len(group), size):
                yield group[start : start + size]


def answer_tasks(
    checkpoint: Checkpoint,
    samples: Mapping[str, Sequence[Sample]],
    video: Video,
    device: str | None = None,
) -> dict[str, list[str | None]]:
    """Load a checkpoint, BF16 or quantized, answer the items of every task, and release the model.

    Args:
        checkpoint: An opened directory.
        samples: Items by task.
        video: How clips are sampled and pruned.
        device: A torch device; by default the GPU if there is one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_exported(checkpoint, device)
    answers: dict[str, list[str | None]] = {}
    for task, asked in samples.items():
        logger.info("%s: %d items of %s", checkpoint.directory.name, len(asked), task)
        answered = generate(
            model, checkpoint.config, checkpoint.tokenizer, asked, video, describe=task
        )
        answers[task] = list(answered)
    return answers
