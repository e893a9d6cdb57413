"""The samples that a distillation trains on: an endless dataset that can begin at any position."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch.utils.data import IterableDataset

from calibrate.samples import Sample, Skipped
from checkpoint.faults import BadInput, Fault
from checkpoint.log import get_logger
from checkpoint.processes import ALONE, Processes
from quantize.distill.ahead import Decoded, Embedded, MadeAhead, Place
from quantize.distill.rows import (
    Prepared,
    Row,
    answer_only,
    longest_first,
    packed_rows,
    with_answer,
)

logger = get_logger(__name__)

_MOST_LEFT_OUT = 100_000
"""Samples in a row that say the same as held-out ones before an endless source is given up."""


class TrainingDataset(IterableDataset):
    """Rows in a fixed order, repeated when the samples run out.

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
        samples: Callable[[Skipped], Iterator[Sample]],
        prepare: Callable[[Sample, float], Prepared],
        embed: Callable[[Prepared], Row],
        rates: Sequence[float],
        held_out: int,
        seed: int,
        skipped: Skipped,
        processes: Processes = ALONE,
        step_rows: int = 1,
        pack_length: int | None = None,
    ) -> None:
        """Describe the dataset; nothing is read yet.

        Args:
            samples: Opens one pass over the samples, the same at every call. It gives the rows that
                are no samples to the `Skipped`.
            prepare: Decodes a sample for an EVS rate. Called in a thread, for samples to come.
            embed: Makes the row of a decoded sample.
            rates: EVS rates. Each sample draws one by `seed` and its position, in whatever process.
            held_out: Samples at the head of every pass that are not trained on.
            seed: Draws the EVS rates.
            skipped: Takes samples that cannot be used and rows that are none, at their turn.
            processes: Each of n processes takes every n-th sample, so that an optimizer step has
                the same samples for any n.
            step_rows: Rows of this process per optimizer step; each such group comes longest
                first.
            pack_length: Tokens of a row that is filled with samples; None: a row is one sample. A
                process fills its rows with its own samples, so packed steps differ with the number
                of processes.
        """
        self.start = 0
        self.skipped = skipped
        self.answered: dict[int, bool] = {}
        self._samples = samples
        self._prepare = prepare
        self._embed = embed
        self._rates = list(rates)
        self._held_out = held_out
        self._seed = seed
        self._processes = processes
        self._step_rows = step_rows
        self._pack_length = pack_length
        # By number in a pass: rows may have the same id. By rate: a clip may be too long at one of
        # them only, and a resumed run has not met the others.
        self._unusable_at: dict[int, set[float]] = {}
        self._has_warned_of_held_out = False
        self._ahead: MadeAhead | None = None
        self._step_samples = 0

    def held_out(self) -> list[Row]:
        """Return the held-out rows, in which only answers count; the EVS rates take turns.

        Raises:
            BadInput: None of them can be used.
        """
        rows = []
        unanswered = 0
        samples = itertools.islice(self._samples(self.skipped), self._held_out)
        for number, sample in enumerate(samples):
            try:
                rate = self._rates[number % len(self._rates)]
                row = self._embed(self._prepare(sample, rate))
            except BadInput as bad:
                self.skipped.add(*bad.faults)
                continue
            rows.append(answer_only(row))
            unanswered += row["answer_length"] == 0
        if unanswered:
            message = "%d of %d held-out samples have no answer: they are judged on their prompts"
            logger.warning(message, unanswered, len(rows))
        if not rows:
            what = "hold no usable held-out sample"
            summary = Fault("distill.sources", what, "give more samples, or raise distill.held_out")
            raise BadInput(summary, *self.skipped.faults)
        return list(packed_rows(longest_first(rows), self._pack_length))

    def warn_of_unanswered(self) -> None:
        """Log how many of the samples that were trained on have no answer."""
        unanswered = sum(1 for has_answer in self.answered.values() if not has_answer)
        if unanswered:
            message = "%d of %d training samples have no answer: only their prompts are learnt"
            logger.warning(message, unanswered, len(self.answered))

    def __iter__(self) -> Iterator[Row]:
        """Yield this process's rows from `start` on; never ends."""
        self.close()
        self._ahead = MadeAhead(self._decoded(), self._embed)
        rows = packed_rows(self._in_order(self._ahead), self._pack_length)
        while True:
            group = list(itertools.islice(rows, self._step_rows))
            self._step_samples = sum(len(row["lengths"]) for row in group)
            next_position = group[-1]["position"] + 1
            for row in longest_first(group):
                yield row | {"next_position": next_position}

    def embed_ahead(self) -> None:
        """Embed what has been decoded by now, as many samples as the last step had."""
        if self._ahead is not None:
            self._ahead.embed_decoded(self._step_samples)

    def close(self) -> None:
        """End the thread that decodes."""
        if self._ahead is not None:
            self._ahead.close()

    def _in_order(self, samples: Iterable[Embedded]) -> Iterator[Row]:
        unusable = 0
        for place, row in samples:
            for faults in place.left_out:
                self.skipped.add(*faults)
            if row is None or isinstance(row, BadInput):
                self._note_unusable(place, row)
                unusable += 1
                self._check_any_usable(unusable)
            else:
                unusable = 0
                self.answered[place.number] = row["answer_length"] > 0
                yield row | {"position": place.position}

    def _decoded(self) -> Iterator[Decoded]:
        """Yield this process's samples from `start` on; called in the thread that decodes."""
        left_out = _LeftOut(self.skipped)
        for position, (number, sample) in enumerate(self._repeated(left_out)):
            if position < self.start:
                continue
            if position % self._processes.count != self._processes.index:
                continue
            rate = random.Random(f"{self._seed} {position}").choice(self._rates)
            place = Place(position, number, rate, left_out.taken())
            if rate in self._unusable_at.get(number, set()):
                yield place, None
                continue
            try:
                yield place, self._prepare(sample, rate)
            except BadInput as bad:
                yield place, bad

    def _note_unusable(self, place: Place, reason: BadInput | None) -> None:
        unusable_at = self._unusable_at.get(place.number, set())
        self._unusable_at[place.number] = unusable_at | {place.rate}
        if reason is not None and not unusable_at:
            self.skipped.add(*reason.faults)

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

    def _repeated(self, skipped: Skipped) -> Iterator[tuple[int, Sample]]:
        """Yield the samples to train on with their numbers in a pass, again and again.

        Args:
            skipped: Takes the rows that are no samples.
        """
        while True:
            found = False
            left_out = 0
            held_out: set[bytes] = set()
            for number, sample in enumerate(self._samples(skipped)):
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


class _LeftOut(Skipped):
    """Counts the rows that are no samples in the thread that decodes.

    They count for the run at their turn only: which row is read while a step trains depends on how
    long the step takes. Here they count as well, so that bad rows without end are given up.
    """

    def __init__(self, before: Skipped) -> None:
        """Begin with what was skipped before the thread began."""
        super().__init__(before.limit, before.repeats, list(before.faults), before.samples)
        self._new: list[tuple[Fault, ...]] = []

    def add(self, *faults: Fault) -> None:
        """Count one row, as `Skipped` does."""
        self._new.append(faults)
        super().add(*faults)

    def taken(self) -> tuple[tuple[Fault, ...], ...]:
        """Return the faults of the rows since the last call."""
        new = tuple(self._new)
        self._new.clear()
        return new


def _content(sample: Sample) -> bytes:
    """A hash of all that is learnt from a sample: its id and its source do not count."""
    parts = [with_answer(sample).messages, sample.tools]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
