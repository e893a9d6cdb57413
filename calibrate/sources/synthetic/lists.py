"""Draws scenes of text: lists to recall an entry from, and words to order by frequency."""

from __future__ import annotations

from itertools import product

import numpy as np

from calibrate.sources.synthetic.drawing import COLORS, SHAPES
from calibrate.sources.synthetic.scenes import (
    ColoredShape,
    QuestionAnswer,
    Scene,
    code,
    distinct_letters,
    further,
    like,
    shuffled,
)

# Every pair of letters, from aa to zz.
_KEYS = ["".join(letters) for letters in product("abcdefghijklmnopqrstuvwxyz", repeat=2)]


def text(random: np.random.RandomState) -> Scene:
    """Draw a list to recall from, in one of four scenes; otherwise words to order by frequency."""
    if random.rand() < 0.25:
        return recall(random)
    return order(random)


def order(random: np.random.RandomState) -> Scene:
    """Draw words to order by frequency whose counts are close; NVFP4 loses most accuracy here."""
    return frequent(random, close=True)


def recall(random: np.random.RandomState, pairs: int | None = None) -> Scene:
    """Draw a list of keys and values; each question is about the value of one key.

    Args:
        random: Random generator.
        pairs: Length of the list; if not given it is drawn, from 4 to 360. 300 pairs are over 2,000
            tokens.
    """
    if pairs is None:
        pairs = _list_length(random)
    keys = shuffled(random, _KEYS)[:pairs]
    values = random.randint(100, 1000, pairs)
    lines = []
    questions = []
    for key, value in zip(keys, values, strict=True):
        lines.append(f"{key} {value}")
        questions.append((f"What is the value of {key}?", str(value)))
    return _scene_of_list(lines, shuffled(random, questions)[:12])


def _list_length(random: np.random.RandomState) -> int:
    """Draw 300 to 360 for a quarter of the lists, otherwise 4 to 181, most of them short."""
    if random.rand() < 0.25:
        return int(random.randint(300, 361))
    return int(2 ** random.uniform(2, 7.5))


def _scene_of_list(lines: list[str], questions: list[QuestionAnswer]) -> Scene:
    """Return a scene that shows a list; its first question is the first of `questions`."""
    question, answer = questions[0]
    listed = "\n".join(lines)
    return Scene(f"List:\n{listed}\n{question}", answer, more=tuple(questions[1:]))


def frequent(random: np.random.RandomState, close: bool = False) -> Scene:
    """Draw a sequence of words; the answer is the different words from most to least frequent.

    Args:
        random: Random generator.
        close: If true, there are six to eight different words in a sequence of 60 to 200, each 11 %
            more frequent than the next. Otherwise there are four to eight in a sequence of 16 to
            300, each 4 to 120 % more frequent than the next. Close counts show rounding errors.
    """
    fewest = 6 if close else 4
    kinds = int(random.randint(fewest, 9))
    names = random.choice([*COLORS, *SHAPES], kinds, replace=False).tolist()
    if close:
        words = random.uniform(60, 200)
        ratios = np.full(kinds - 1, 1.11)
    else:
        words = 2 ** random.uniform(4, 8.2)
        ratios = 1 + 2 ** random.uniform(-4.6, 0.3, kinds - 1)
    shares = np.cumprod([1.0, *ratios])
    counts = np.maximum(1, np.round(shares * int(words) / shares.sum())).astype(int)
    # Rounding may have made counts equal, which would leave the order open.
    for place in range(1, kinds):
        counts[place] = max(counts[place], counts[place - 1] + 1)
    sequence = random.permutation(np.repeat(np.arange(kinds), counts))
    listed = " ".join(names[place] for place in sequence)
    answer = " ".join(reversed(names))
    return Scene(f"Words: {listed}\nOrder them from most to least frequent.", answer)


def code_list(random: np.random.RandomState) -> Scene:
    """Draw a list of labels and codes: the content of `form`, as text. Only training uses it."""
    lines = int(random.randint(2, 13))
    labels = distinct_letters(random, lines)
    listed = []
    questions = []
    for label in labels:
        word = code(random, 4, 6)
        listed.append(f"{label} {word}")
        questions.append((f"What is the code of {label}?", word))
    return _scene_of_list(listed, shuffled(random, questions))


def image_list(random: np.random.RandomState) -> Scene:
    """Draw a list of described pictures: the content of `images`, as text.

    Only training uses it: the language model learns the questions about pictures from words first.
    """
    count = int(random.randint(2, 6))
    things = []
    for _ in range(count):
        shape = str(random.choice(SHAPES))
        color = str(random.choice(list(COLORS)))
        things.append(ColoredShape(shape, color))
    answer = int(random.randint(count))
    for place in range(count):
        if place != answer:
            things[place] = like(random, things[answer])
    shown = [thing.description for thing in things]
    questions = [f"Which image shows a {description}?" for description in shown]
    lines = [f"Image {number}: {description}" for number, description in enumerate(shown, 1)]
    more = further(random, questions, shown, answer)
    listed = "\n".join(lines)
    return Scene(f"{listed}\n{questions[answer]}", str(answer + 1), more=more)
