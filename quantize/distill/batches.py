"""The samples a model is distilled on: an endless stream, embedded one by one, that can begin at
any position.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from calibrate.forward import embed
from calibrate.prompts import answer_length, build_prompt
from calibrate.samples import Sample, Skipped
from checkpoint.classes import NemotronH_Omni_Reasoning_V3
from checkpoint.config import CheckpointConfig
from checkpoint.faults import BadInput, Fault

IGNORE = -100
"""Label of a token that nobody is asked to predict, as torch and ModelOpt write it."""

Batch = dict[str, Any]
"""`inputs_embeds` [1, length, hidden] and int64 `labels` [1, length], both on the CPU; `answer`,
how many of the last tokens are the answer."""


def with_answer(sample: Sample) -> Sample:
    """The conversation with the expected answer as its last turn, where the source knows one and it
    is not there.
    """
    if sample.answer is None or not sample.messages or sample.messages[-1]["role"] == "assistant":
        return sample
    return replace(
        sample, messages=[*sample.messages, {"role": "assistant", "content": sample.answer}]
    )


def batch_of(
    model: NemotronH_Omni_Reasoning_V3,
    sample: Sample,
    config: CheckpointConfig,
    tokenizer: PreTrainedTokenizerFast,
    pruning_rate: float,
    max_length: int,
) -> Batch:
    """Embed one image, video or text sample; teacher and student are both given these embeddings.

    A batch is one sample. The plain Mamba path has no padding mask and would carry its state from
    one packed sample into the next; with one sample there is nothing to pad, and clips that EVS
    shortens need no common length.

    Every token counts in the loss, prompt and answer alike (arXiv 2511.03929), but for visual
    placeholders: what the model says before one is never read. So the loss is
    `accuracy.agreement`'s KL.

    Raises:
        BadInput: The sample cannot be used, as `calibrate.prompts.build_prompt`.
    """
    sample, limit = with_answer(sample), min(max_length, config.max_length)
    prompt = build_prompt(sample, config, tokenizer, max_length=limit, pruning_rate=pruning_rate)
    embedded = embed(model, prompt, config, pruning_rate)
    labels = embedded.token_ids.masked_fill(embedded.token_ids == config.image_token_id, IGNORE)
    if not bool((labels[1:] != IGNORE).any()):
        raise BadInput(Fault(sample.where, "has no token to learn from", "give it some text"))
    answer = torch.tensor(answer_length(sample, config, tokenizer))
    return {
        "inputs_embeds": embedded.inputs_embeds[None].cpu(),
        "labels": labels[None].cpu(),
        "answer": answer,
    }


def answer_alone(batch: Batch) -> Batch:
    """A batch whose answer alone counts, where it has one.

    A rate that is too high learns prompts best of all and answers worse than PTQ: over all tokens,
    of which answers are a few in a hundred, it has the lowest KL
    (benchmarks/results/qad_learning_rates.json).
    """
    answer, labels = int(batch["answer"]), batch["labels"].clone()
    if answer:
        labels[:, :-answer] = IGNORE
    return batch | {"labels": labels}


def longest_first(batches: list[Batch]) -> list[Batch]:
    """Sort by length. Sharded processes run in step, so each waits for the longest sample among
    them.

    When each process sorts its own share of a step, samples of like length meet. Of synthetic
    pictures, clips and texts in steps of 128, two processes then wait 6% of the time and not 26%,
    four 15% and not 45%, eight 28% and not 57% (tests/quantize/test_distill_stream.py).
    """
    return sorted(batches, key=lambda batch: -batch["labels"].numel())


class TrainingStream(IterableDataset):
    """Batches in a fixed order, begun again when the samples run out; the first `held_out` samples
    are kept apart.

    Attributes:
        start: Position of the first sample to use. Those before it are passed over unread, so
            resuming costs nothing.
        skipped: Samples that could not be used, each counted once however often the stream repeats.
    """

    def __init__(
        self,
        samples: Callable[[], Iterator[Sample]],
        embed_sample: Callable[[Sample, float], Batch],
        rates: Sequence[float],
        held_out: int,
        seed: int,
        max_skipped: int,
        rank: int = 0,
        ranks: int = 1,
        step: int = 1,
    ) -> None:
        """Describe the stream; nothing is read yet.

        Args:
            samples: Opens one pass over the samples, the same at every call.
            embed_sample: Makes the batch of a sample at an EVS rate.
            rates: EVS rates; each batch draws one by `seed` and its position, whoever asks.
            held_out: Samples at the head of every pass that are not trained on.
            seed: Of the EVS rates.
            max_skipped: Bad samples before the run stops.
            rank: This process; it takes every `ranks`-th sample, so a step of any number of
                processes has the same.
            ranks: Number of processes.
            step: Batches that this process takes for an optimizer step; each such group comes
                longest first.
        """
        self.start = 0
        self.skipped = Skipped(max_skipped)
        self._samples, self._embed, self._held_out = samples, embed_sample, held_out
        self._rates, self._seed, self._rank, self._ranks, self._step = (
            rates,
            seed,
            rank,
            ranks,
            step,
        )
        self._bad: set[str] = set()

    def held_out(self) -> list[Batch]:
        """The held-out batches, in which answers alone count; the EVS rates take turns.

        Raises:
            BadInput: None of them can be used.
        """
        batches = []
        for number, sample in enumerate(itertools.islice(self._samples(), self._held_out)):
            batch = self._usable(sample, self._rates[number % len(self._rates)])
            batches += [answer_alone(batch)] if batch else []
        if not batches:
            raise BadInput(
                Fault("distill.sources", "hold no usable held-out sample", "give more samples")
            )
        return longest_first(batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this process's batches from `start` on, each with `next`, where the next step
        begins; never ends.
        """
        batches = self._in_order()
        while group := list(itertools.islice(batches, self._step)):
            end = group[-1]["position"] + 1
            yield from (batch | {"next": end} for batch in longest_first(group))

    def _in_order(self) -> Iterator[Batch]:
        for position, sample in enumerate(self._repeated()):
            if position < self.start or position % self._ranks != self._rank:
                continue
            rate = random.Random(f"{self._seed} {position}").choice(list(self._rates))
            if batch := self._usable(sample, rate):
                yield batch | {"position": torch.tensor(position)}

    def _repeated(self) -> Iterator[Sample]:
        while True:
            found = False
            for sample in itertools.islice(self._samples(), self._held_out, None):
                found = True
                yield sample
            if not found:
                what = f"hold no sample beyond the {self._held_out} held out"
                raise BadInput(
                    Fault("distill.sources", what, "give more samples, or lower distill.held_out")
                )

    def _usable(self, sample: Sample, rate: float) -> Batch | None:
        if sample.where in self._bad:
            return None
        try:
            return self._embed(sample, rate)
        except BadInput as bad:
            self._bad.add(sample.where)
            self.skipped.add(*bad.faults)
            return None
