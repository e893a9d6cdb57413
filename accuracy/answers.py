"""Greedy answers in process: prompts of equal length are decoded together, the rest one by one,
nothing is padded.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from calibrate.forward import Embedded, embed
from calibrate.prompts import build_prompt
from calibrate.samples import Sample
from checkpoint.classes import NemotronH_Omni_Reasoning_V3
from checkpoint.config import CheckpointConfig
from checkpoint.native import load_tokenizer
from export.load import load_exported

MAX_ANSWER_TOKENS = 24
_AHEAD = 64
"""Prompts embedded before the first of them is decoded, to find equal lengths among."""
_BATCH_TOKENS = 8192


@torch.no_grad()
def generate(
    model: NemotronH_Omni_Reasoning_V3,
    config: CheckpointConfig,
    tokenizer: PreTrainedTokenizerFast,
    samples: Sequence[Sample],
    pruning_rate: float = 0.0,
    describe: str = "answering",
) -> list[str]:
    """Answer every sample greedily, up to 24 tokens.

    Args:
        model: BF16, or read back from an export.
        config: The checkpoint's.
        tokenizer: The checkpoint's.
        samples: Without an assistant's turn at the end.
        pruning_rate: EVS rate of the videos.
        describe: Name on the progress bar.

    Returns:
        Answers without special tokens, in the order of `samples`.

    Raises:
        BadInput: A sample that cannot be built.
    """
    answers: dict[int, str] = {}
    embedded = (
        embed(model, build_prompt(s, config, tokenizer), config, pruning_rate) for s in samples
    )
    with tqdm(
        total=len(samples), desc=describe, unit="item", leave=False, disable=None
    ) as progress:
        for batch in _equal_lengths(enumerate(embedded)):
            tokens = _decode(
                model.language_model, torch.stack([item.inputs_embeds for _, item in batch]), config
            )
            for (index, _), row in zip(batch, tokens, strict=True):
                answers[index] = str(tokenizer.decode(row, skip_special_tokens=True))
            progress.update(len(batch))
    return [answers[index] for index in range(len(samples))]


def _decode(
    language_model: nn.Module, inputs_embeds: torch.Tensor, config: CheckpointConfig
) -> torch.Tensor:
    """Greedy tokens [batch, up to 24]. transformers 5.19 has no `generate` from embeddings for this
    language model.
    """
    end = config.text["eos_token_id"]
    output = language_model(inputs_embeds=inputs_embeds, use_cache=True, logits_to_keep=1)
    tokens = [output.logits[:, -1].argmax(-1)]
    ended = tokens[0] == end
    while len(tokens) < MAX_ANSWER_TOKENS and not bool(ended.all()):
        output = language_model(
            input_ids=tokens[-1][:, None], past_key_values=output.past_key_values, use_cache=True
        )
        following = output.logits[:, -1].argmax(-1)
        tokens.append(torch.where(ended, end, following))
        ended |= following == end
    return torch.stack(tokens, dim=1)


def _equal_lengths(items: Iterable[tuple[int, Embedded]]) -> Iterator[list[tuple[int, Embedded]]]:
    """Batches of prompts of one length; Mamba's state has no mask for padding, and activations are
    what is measured.
    """
    iterator = iter(items)
    while ahead := list(itertools.islice(iterator, _AHEAD)):
        groups: dict[int, list[tuple[int, Embedded]]] = defaultdict(list)
        for item in ahead:
            groups[len(item[1].token_ids)].append(item)
        for length, group in groups.items():
            size = max(1, _BATCH_TOKENS // length)
            yield from (group[start : start + size] for start in range(0, len(group), size))


def answer_tasks(
    config: CheckpointConfig,
    samples: Mapping[str, Sequence[Sample]],
    pruning_rate: float,
    device: str | None = None,
) -> dict[str, list[str | None]]:
    """Load a directory, BF16 or quantized, answer the items of every task, and let the model go.

    Args:
        config: The directory's.
        samples: Items by task.
        pruning_rate: EVS rate of the videos.
        device: The GPU if there is one by default.
    """
    model = load_exported(config, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = load_tokenizer(config)
    answers: dict[str, list[str | None]] = {}
    for task, asked in samples.items():
        answers[task] = list(generate(model, config, tokenizer, asked, pruning_rate, describe=task))
    return answers
