"""Rows, which the language model is run on: a sample's own, made in two parts, what needs no model
and what does; and rows of several samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from calibrate.forward import embed
from calibrate.prompts import Prompt, answer_length, build_prompt
from calibrate.samples import Sample
from checkpoint.config import CheckpointConfig
from checkpoint.faults import BadInput, Fault
from checkpoint.opened import Checkpoint
from checkpoint.video import Video

if TYPE_CHECKING:
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3

IGNORE = -100
"""Label of a token that does not count in the loss, as in torch and ModelOpt."""

Row = dict[str, Any]
"""One row: `inputs_embeds` [1, length, hidden], int64 `text_ids` [1, length], `IGNORE` at visual
tokens, int64 `labels` [1, length] and float32 `weights` [1, length], what each counts in the loss,
all on the CPU; `lengths`, the tokens of its samples. Of a single sample also `answer_length`, how
many of its last tokens are the answer. From the dataset also `position`, that of its last sample,
and `next_position`, where the next optimizer step begins.
"""


def with_answer(sample: Sample) -> Sample:
    """Return the conversation with the expected answer as its last turn.

    A sample without an expected answer, or whose last turn is the assistant's, is returned as it
    is. An empty expected answer, or white space, is none.
    """
    if sample.answer is None or not sample.answer.strip() or not sample.messages:
        return sample
    if sample.messages[-1]["role"] == "assistant":
        return sample
    answer = {"role": "assistant", "content": sample.answer}
    return replace(sample, messages=[*sample.messages, answer])


def ends_with_nothing(sample: Sample) -> bool:
    """Whether the last turn is the assistant's and says nothing: a student would learn to be
    silent.
    """
    if not sample.messages or sample.messages[-1]["role"] != "assistant":
        return False
    turn = sample.messages[-1]
    if turn.get("tool_calls") or turn.get("reasoning"):
        return False
    parts = turn["content"]
    if isinstance(parts, str):
        return not parts.strip()
    return all(part["type"] == "text" and not part["text"].strip() for part in parts)


@dataclass(frozen=True)
class Prepared:
    """A sample before it is embedded: decoded, cut into tiles and tokenized.

    Attributes:
        prompt: The conversation with its answer.
        answer_length: How many of its last tokens are the answer.
    """

    prompt: Prompt
    answer_length: int


def prepare(sample: Sample, checkpoint: Checkpoint, video: Video, max_length: int) -> Prepared:
    """Do all that needs no model for a sample's row.

    Args:
        sample: An image, video or text conversation.
        checkpoint: The model's.
        video: How clips are sampled and pruned.
        max_length: Most tokens after EVS.

    Raises:
        BadInput: The sample cannot be used, as in `calibrate.prompts.build_prompt`, or its answer
            is empty.
    """
    config = checkpoint.config
    sample = with_answer(sample)
    if ends_with_nothing(sample):
        what = "ends with an empty answer, which would teach silence"
        raise BadInput(Fault(sample.where, what, "remove the sample, or its last turn"))
    limit = min(max_length, config.max_length)
    prompt = build_prompt(sample, config, checkpoint.tokenizer, video, max_length=limit)
    return Prepared(prompt, answer_length(sample, config, checkpoint.tokenizer))


def row_of_sample(
    model: NemotronH_Omni_Reasoning_V3,
    prepared: Prepared,
    config: CheckpointConfig,
    prompt_weight: float = 1.0,
) -> Row:
    """Embed one sample; teacher and student are both given these embeddings, unless the student's
    own train.

    Every token counts in the loss, by default prompt and answer alike (arXiv 2511.03929), except
    visual placeholders: what the model predicts for one is never read. So the loss is the KL
    divergence of `accuracy.agreement`.

    Args:
        model: Embeds tokens, tiles and frames.
        prepared: The sample.
        config: The model's.
        prompt_weight: What a token of the prompt counts beside one of the answer. A sample without
            an answer counts whole.

    Raises:
        BadInput: The sample has no token to learn from.
    """
    embedded = embed(model, prepared.prompt, config)
    is_visual = embedded.token_ids == config.image_token_id
    text_ids = embedded.token_ids.masked_fill(is_visual, IGNORE)
    labels = text_ids.clone()
    if not bool((labels[1:] != IGNORE).any()):
        where = prepared.prompt.sample_id
        raise BadInput(Fault(where, "has no token to learn from", "give it some text"))
    answer = prepared.answer_length
    weights = torch.ones(labels.shape)
    if answer:
        weights[:-answer] = prompt_weight
    return {
        "inputs_embeds": embedded.inputs_embeds[None].cpu(),
        "text_ids": text_ids[None].cpu(),
        "labels": labels[None].cpu(),
        "weights": weights[None],
        "lengths": (len(labels),),
        "answer_length": answer,
    }


def answer_only(row: Row) -> Row:
    """Return a row in which only the answer counts; the whole sample if it has none.

    A learning rate that is too high learns prompts best of all and answers worse than PTQ: over all
    tokens, of which answers are a few in a hundred, it has the lowest KL divergence
    (benchmarks/results/qad_learning_rates.json).
    """
    length = row["answer_length"]
    labels = row["labels"].clone()
    if length:
        labels[:, :-length] = IGNORE
    return row | {"labels": labels}


def joined_row(samples: Sequence[Row]) -> Row:
    """Join rows of one sample each into one; the first token of each is nobody's next token."""
    joined: Row = {}
    for name in ("inputs_embeds", "text_ids", "labels", "weights"):
        joined[name] = torch.cat([row[name] for row in samples], dim=1)
    joined["lengths"] = tuple(row["lengths"][0] for row in samples)
    start = 0
    for length in joined["lengths"]:
        joined["labels"][:, start] = IGNORE
        start += length
    if "position" in samples[-1]:
        joined["position"] = samples[-1]["position"]
    return joined


def packed_rows(samples: Iterable[Row], pack_length: int | None) -> Iterator[Row]:
    """Yield rows of up to `pack_length` tokens, filled with whole samples in their order.

    Args:
        samples: Rows of one sample each, none of them longer than `pack_length`.
        pack_length: Tokens of a row; None leaves each sample its own.
    """
    if pack_length is None:
        yield from samples
        return
    waiting: list[Row] = []
    tokens = 0
    for row in samples:
        length = _length(row)
        if waiting and tokens + length > pack_length:
            yield joined_row(waiting)
            waiting = []
            tokens = 0
        waiting.append(row)
        tokens += length
    if waiting:
        yield joined_row(waiting)


def longest_first(rows: list[Row]) -> list[Row]:
    """Sort rows by length, the longest first.

    Sharded processes run in step, so each waits for the longest sample among them. When each
    process sorts its own share of an optimizer step, samples of similar length meet. Of synthetic
    pictures, clips and texts in steps of 128, two processes then wait 6% of the time instead of
    26%, four 15% instead of 45%, eight 28% instead of 57%
    (tests/quantize/distill/test_dataset.py).
    """
    return sorted(rows, key=_length, reverse=True)


def _length(row: Row) -> int:
    return int(row["labels"].numel())
