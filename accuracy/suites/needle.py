"""Finds a number in a long text, at several lengths up to the context: our own task."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from accuracy.suites.harness import Item, Judge, PromptText, Scored

SHORTEST = 4096
_STEP = 4
DEPTHS = 64
"""Places of the number for each length, from the beginning to the end of the text: 256 items at the
four lengths of a context of 131,072, which is enough to tell a loss of 1.5 points."""
_ROOM = 256
"""Tokens left for the question, the template and the answer."""

_SUBJECTS = ("The harbour", "A carpenter", "The old library", "My neighbour", "The night train")
_VERBS = ("waits for", "remembers", "passes", "repairs", "describes")
_OBJECTS = ("the first snow", "a stone bridge", "three green boats", "an open window", "the market")
_PLACES = (
    "Lisbon",
    "Oslo",
    "Quito",
    "Osaka",
    "Dakar",
    "Perth",
    "Turin",
    "Haifa",
    "Leeds",
    "Bergen",
)


def needle_lengths(context: int) -> tuple[int, ...]:
    """Return the lengths in tokens: 4,096, four times as many and so on, and the whole context.

    Args:
        context: Longest sequence that the server takes.
    """
    lengths = []
    length = SHORTEST
    while length < context:
        lengths.append(length)
        length *= _STEP
    return (*lengths, context)


class NeedleTask:
    """The task, with texts measured by a checkpoint's tokenizer.

    Attributes:
        items: `LENGTH/DEPTH`, as `4096/3`.
        media_root: None: there are no clips.
        data: Which texts these are.
    """

    media_root: Path | None = None
    data = "needle 1"

    def __init__(self, tokenizer: Path, context: int, limit: int | None = None) -> None:
        """Prepare the items.

        Args:
            tokenizer: The checkpoint's tokenizer.json.
            context: Longest sequence in tokens.
            limit: Items per length; None for one at each of the 64 depths.
        """
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        count = DEPTHS if limit is None else min(limit, DEPTHS)
        depths = [round(number * (DEPTHS - 1) / max(1, count - 1)) for number in range(count)]
        items = []
        for length in needle_lengths(context):
            for depth in depths:
                items.append(Item(f"{length}/{depth}", part=f"{length:,} tokens"))
        self.items = tuple(items)

    def prompt(self, item: Item) -> PromptText:
        """Return the text with the number in it, and the question."""
        length, depth = (int(part) for part in item.id.split("/"))
        place, number = _secret(item.id)
        needle = f"The number of the locker in {place} is {number}."
        question = f"What is the number of the locker in {place}? Answer with the number only."
        sentences = self._filler(item.id, length - _ROOM)
        position = round(depth * len(sentences) / (DEPTHS - 1))
        sentences.insert(position, needle)
        text = " ".join(sentences)
        return PromptText([{"role": "user", "content": f"{text}\n\n{question}"}])

    def score(self, answers: Mapping[str, str], judge: Judge | None = None) -> Scored:
        """Score answers: right when the first number in it is the one in the text."""
        scores = {}
        for item, answer in answers.items():
            found = re.search(r"\d+", answer)
            scores[item] = float(found is not None and found[0] == _secret(item)[1])
        return Scored(scores, 100 * sum(scores.values()) / len(scores))

    def close(self) -> None:
        """There is nothing to release."""

    def _filler(self, seed: str, tokens: int) -> list[str]:
        """Sentences of at most `tokens` tokens together."""
        drawn = random.Random(f"filler {seed}")
        sentences: list[str] = []
        left = tokens
        while True:
            sentence = _sentence(drawn)
            cost = len(self._tokenizer.encode(f" {sentence}", add_special_tokens=False).ids)
            if cost > left:
                return sentences
            sentences.append(sentence)
            left -= cost


def _sentence(drawn: random.Random) -> str:
    subject, verb = drawn.choice(_SUBJECTS), drawn.choice(_VERBS)
    return f"{subject} {verb} {drawn.choice(_OBJECTS)} in {drawn.choice(_PLACES)}."


def _secret(seed: str) -> tuple[str, str]:
    """The place that is asked for and the number there."""
    drawn = random.Random(f"needle {seed}")
    return drawn.choice(_PLACES), str(drawn.randint(10_000, 99_999))
