"""The samples that a distillation trains on, embedded one by one: an endless dataset that can begin
at any position.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset

from calibrate.forward import embed
from calibrate.prompts import answer_length, build_prompt
from calibrate.samples import Sample, Skipped
from checkpoint.faults import BadInput, Fault
from checkpoint.log import get_logger
from checkpoint.opened import Checkpoint
from checkpoint.processes import ALONE, Processes
from checkpoint.video import Video

if TYPE_CHECKING:
    from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3

logger = get_logger(__name__)

IGNORE = -100
"""Label of a token that does not count in the loss, as in torch and ModelOpt."""

_MOST_LEFT_OUT = 100_000
"""Samples in a row that say the same as held-out ones before an endless source is given up."""

Batch = dict[str, Any]
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


def batch_of(
    model: NemotronH_Omni_Reasoning_V3,
    sample: Sample,
    checkpoint: Checkpoint,
    video: Video,
    max_length: int,
    prompt_weight: float = 1.0,
) -> Batch:
    """Embed one sample; teacher and student are both given these embeddings, unless the student's
    own train.

    Every token counts in the loss, by default prompt and answer alike (arXiv 2511.03929), except
    visual placeholders: what the model predicts for one is never read. So the loss is the KL
    divergence of `accuracy.agreement`.

    Args:
        model: Embeds tokens, tiles and frames.
        sample: An image, video or text conversation.
        checkpoint: The model's.
        video: How clips are sampled and pruned.
        max_length: Most tokens after EVS.
        prompt_weight: What a token of the prompt counts beside one of the answer. A sample without
            an answer counts whole.

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
    embedded = embed(model, prompt, config)
    is_visual = embedded.token_ids == config.image_token_id
    text_ids = embedded.token_ids.masked_fill(is_visual, IGNORE)
    labels = text_ids.clone()
    if not bool((labels[1:] != IGNORE).any()):
        raise BadInput(Fault(sample.where, "has no token to learn from", "give it some text"))
    answer = answer_length(sample, config, checkpoint.tokenizer)
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


def answer_only(batch: Batch) -> Batch:
    """Return a batch in which only the answer counts; the whole sample if it has none.

    A learning rate that is too high learns prompts best of all and answers worse than PTQ: over all
    tokens, of which answers are a few in a hundred, it has the lowest KL divergence
    (benchmarks/results/qad_learning_rates.json).
    """
    length = batch["answer_length"]
    labels = batch["labels"].clone()
    if length:
        labels[:, :-length] = IGNORE
    return batch | {"labels": labels}


def row_of(batches: Sequence[Batch]) -> Batch:
    """Join samples into one row; the first token of each is nobody's next token."""
    row: Batch = {}
    for name in ("inputs_embeds", "text_ids", "labels", "weights"):
        row[name] = torch.cat([batch[name] for batch in batches], dim=1)
    row["lengths"] = tuple(batch["lengths"][0] for batch in batches)
    start = 0
    for length in row["lengths"]:
        row["labels"][:, start] = IGNORE
        start += length
    if "position" in batches[-1]:
        row["position"] = batches[-1]["position"]
    return row


def packed_rows(batches: Iterable[Batch], pack_length: int | None) -> Iterator[Batch]:
    """Yield rows of up to `pack_length` tokens, filled with whole samples in their order.

    Args:
        batches: Samples, none of them longer than `pack_length`.
        pack_length: Tokens of a row; None leaves each sample its own.
    """
    if pack_length is None:
        yield from batches
        return
    waiting: list[Batch] = []
    tokens = 0
    for batch in batches:
        length = _length(batch)
        if waiting and tokens + length > pack_length:
            yield row_of(waiting)
            waiting = []
            tokens = 0
        waiting.append(batch)
        tokens += length
    if waiting:
        yield row_of(waiting)


def longest_first(batches: list[Batch]) -> list[Batch]:
    """Sort batches by length, the longest first.

    Sharded processes run in step, so each waits for the longest sample among them. When each
    process sorts its own share of an optimizer step, samples of similar length meet. Of synthetic
    pictures, clips and texts in steps of 128, two processes then wait 6% of the time instead of
    26%, four 15% instead of 45%, eight 28% instead of 57%
    (tests/quantize/distill/test_dataset.py).
    """
    return sorted(batches, key=_length, reverse=True)


def _length(batch: Batch) -> int:
    return int(batch["labels"].numel())


class TrainingDataset(IterableDataset):
    """Batches in a fixed order, repeated when the samples run out.

    The first `held_out` samples are never trained on, nor are later ones that say the same: the
    best step would be chosen by what was learnt by heart.

    Attributes:
        start: Position of the first sample to use. Those before it are not read, so resuming costs
            nothing.
        skipped: Samples that could not be used, each counted once however often it comes.
        answered: Whether a sample has an answer, for every one that was trained on, by its number
            in a pass.
    """

    def __init__(
        self,
        samples: Callable[[], Iterator[Sample]],
        embed_sample: Callable[[Sample, float], Batch],
        rates: Sequence[float],
        held_out: int,
        seed: int,
        skipped: Skipped,
        processes: Processes = ALONE,
        step_batches: int = 1,
        pack_length: int | None = None,
    ) -> None:
        """Describe the dataset; nothing is read yet.

        Args:
            samples: Opens one pass over the samples, the same at every call.
            embed_sample: Makes the batch of a sample at an EVS rate.
            rates: EVS rates. Each batch draws one by `seed` and its position, in whatever process.
            held_out: Samples at the head of every pass that are not trained on.
            seed: Draws the EVS rates.
            skipped: Takes the samples that cannot be used, with those that `samples` leaves out.
            processes: Each of n processes takes every n-th sample, so that an optimizer step has
                the same samples for any n.
            step_batches: Rows of this process per optimizer step; each such group comes longest
                first.
            pack_length: Tokens of a row that is filled with samples; None: a row is one sample. A
                process fills its rows with its own samples, so packed steps differ with the number
                of processes.
        """
        self.start = 0
        self.skipped = skipped
        self.answered: dict[int, bool] = {}
        self._samples = samples
        self._embed_sample = embed_sample
        self._rates = list(rates)
        self._held_out = held_out
        self._seed = seed
        self._processes = processes
        self._step_batches = step_batches
        self._pack_length = pack_length
        # By number in a pass: rows may have the same id. By rate: a clip may be too long at one of
        # them only, and a resumed run has not met the others.
        self._unusable_at: dict[int, set[float]] = {}
        self._has_warned_of_held_out = False

    def held_out(self) -> list[Batch]:
        """Return the held-out rows, in which only answers count; the EVS rates take turns.

        Raises:
            BadInput: None of them can be used.
        """
        batches = []
        unanswered = 0
        for number, sample in enumerate(itertools.islice(self._samples(), self._held_out)):
            try:
                batch = self._embed_sample(sample, self._rates[number % len(self._rates)])
            except BadInput as bad:
                self.skipped.add(*bad.faults)
                continue
            batches.append(answer_only(batch))
            unanswered += batch["answer_length"] == 0
        if unanswered:
            message = "%d of %d held-out samples have no answer: they are judged on their prompts"
            logger.warning(message, unanswered, len(batches))
        if not batches:
            what = "hold no usable held-out sample"
            summary = Fault("distill.sources", what, "give more samples, or raise distill.held_out")
            raise BadInput(summary, *self.skipped.faults)
        return list(packed_rows(longest_first(batches), self._pack_length))

    def warn_of_unanswered(self) -> None:
        """Log how many of the samples that were trained on have no answer."""
        unanswered = sum(1 for has_answer in self.answered.values() if not has_answer)
        if unanswered:
            message = "%d of %d training samples have no answer: only their prompts are learnt"
            logger.warning(message, unanswered, len(self.answered))

    def __iter__(self) -> Iterator[Batch]:
        """Yield this process's rows from `start` on; never ends."""
        rows = packed_rows(self._in_order(), self._pack_length)
        while True:
            group = list(itertools.islice(rows, self._step_batches))
            next_position = group[-1]["position"] + 1
            for batch in longest_first(group):
                yield batch | {"next_position": next_position}

    def _in_order(self) -> Iterator[Batch]:
        unusable = 0
        for position, (number, sample) in enumerate(self._repeated()):
            if position < self.start:
                continue
            if position % self._processes.count != self._processes.index:
                continue
            rate = random.Random(f"{self._seed} {position}").choice(self._rates)
            batch = self._batch(number, sample, rate)
            if batch is None:
                unusable += 1
                self._check_any_usable(unusable)
            else:
                unusable = 0
                self.answered[number] = batch["answer_length"] > 0
                yield batch | {"position": position}

    def _check_any_usable(self, unusable: int) -> None:
        """Raise once this process has tried every sample that it ever gets, and none was usable.

        It gets each sample once in as many passes as there are processes.
        """
        rates = set(self._rates)
        every_rate = all(tried == rates for tried in self._unusable_at.values())
        if every_rate and unusable > len(self._unusable_at) * self._processes.count:
            what = "hold no usable sample to train on"
            summary = Fault("distill.sources", what, "give more samples")
            raise BadInput(summary, *self.skipped.faults)

    def _repeated(self) -> Iterator[tuple[int, Sample]]:
        """Yield the samples to train on with their numbers in a pass, again and again."""
        while True:
            found = False
            left_out = 0
            held_out: set[bytes] = set()
            for number, sample in enumerate(self._samples()):
                if number < self._held_out:
                    held_out.add(_content(sample))
                elif held_out and _content(sample) in held_out:
                    left_out += 1
                    self._warn_of_held_out(sample)
                    if left_out > _MOST_LEFT_OUT:
                        break
                else:
                    found = True
                    left_out = 0
                    yield number, sample
            if not found or left_out > _MOST_LEFT_OUT:
                beyond = "that says anything but" if left_out else "beyond"
                what = f"hold no sample {beyond} the {self._held_out} held out"
                remedy = "give more samples, or lower distill.held_out"
                raise BadInput(Fault("distill.sources", what, remedy))

    def _warn_of_held_out(self, sample: Sample) -> None:
        """Log the first sample that is left out because it is held out as well."""
        if not self._has_warned_of_held_out and self._processes.is_first:
            self._has_warned_of_held_out = True
            message = "%s: says the same as a held-out sample; such samples are not trained on"
            logger.warning(message, sample.where)

    def _batch(self, number: int, sample: Sample, rate: float) -> Batch | None:
        """The batch of a sample; None if the sample cannot be used at this rate."""
        unusable_at = self._unusable_at.get(number, set())
        if rate in unusable_at:
            return None
        try:
            return self._embed_sample(sample, rate)
        except BadInput as bad:
            self._unusable_at[number] = unusable_at | {rate}
            if not unusable_at:
                self.skipped.add(*bad.faults)
            return None


def _content(sample: Sample) -> bytes:
    """A hash of all that is learnt from a sample: its id and its source do not count."""
    parts = [with_answer(sample).messages, sample.tools]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
