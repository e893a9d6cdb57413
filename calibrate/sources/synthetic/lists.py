"""Draws lists as text and asks for an entry, or for the words of a run in the order of how often
they are there.
"""

from __future__ import annotations

import numpy as np

from calibrate.sources.synthetic.drawing import COLORS, SHAPES
from calibrate.sources.synthetic.scenes import Scene, code, distinct_letters, further, like


def text(random: np.random.RandomState) -> Scene:
    """Recall from a list, or three times as often words to order by how often they are there."""
    return recall(random) if random.rand() < 0.25 else order(random)


def order(random: np.random.RandomState) -> Scene:
    """Words to order by how often they are there, whose counts are close: what NVFP4 hurts most."""
    return frequent(random, close=True)


def recall(random: np.random.RandomState, pairs: int | None = None) -> Scene:
    """Recall from a list of `pairs` keys and values (4 to 360 when not given; 300 pairs are over
    2,000 tokens).
    """
    if pairs is None:
        pairs = (
            int(random.randint(300, 361))
            if random.rand() < 0.25
            else int(2 ** random.uniform(2, 7.5))
        )
    letters = "abcdefghijklmnopqrstuvwxyz"
    keys = [
        letters[number // 26] + letters[number % 26]
        for number in random.permutation(26 * 26)[:pairs]
    ]
    values = random.randint(100, 1000, pairs)
    lines = "\n".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    asked = random.permutation(pairs)[:12]
    first, *more = [(f"What is the value of {keys[place]}?", str(values[place])) for place in asked]
    return Scene(f"List:\n{lines}\n{first[0]}", first[1], more=tuple(more))


def frequent(random: np.random.RandomState, close: bool = False) -> Scene:
    """A run of words, four to eight different ones, mixed: all of them, in order of how often they
    are there.

    Args:
        random: Draws everything.
        close: Each of six to eight words is there 11 % more often than the next, in a run of 60 to
            200; else 4 to 120 % more often, in a run of 16 to 300. Where what is compared is close,
            rounding shows.
    """
    kinds = int(random.randint(6 if close else 4, 9))
    names = [str(name) for name in random.choice([*COLORS, *SHAPES], kinds, replace=False)]
    if close:
        words, ratios = random.uniform(60, 200), np.full(kinds - 1, 1.11)
    else:
        words, ratios = 2 ** random.uniform(4, 8.2), 1 + 2 ** random.uniform(-4.6, 0.3, kinds - 1)
    shares = np.cumprod([1.0, *ratios])
    counts = np.maximum(1, np.round(shares * int(words) / shares.sum())).astype(int)
    for place in range(1, kinds):
        counts[place] = max(counts[place], counts[place - 1] + 1)
    listed = " ".join(
        names[place] for place in random.permutation(np.repeat(np.arange(kinds), counts))
    )
    return Scene(f"Words: {listed}\nOrder them from most to least frequent.", " ".join(names[::-1]))


def code_list(random: np.random.RandomState) -> Scene:
    """Recall of codes from a list: what `form` shows on a page, as text. Training alone draws it."""
    lines = int(random.randint(2, 13))
    labels = distinct_letters(random, lines)
    words = [code(random, 4, 6) for _ in labels]
    questions = [
        (f"What is the code of {label}?", word) for label, word in zip(labels, words, strict=True)
    ]
    first, *more = [questions[place] for place in random.permutation(lines)]
    listed = "\n".join(f"{label} {word}" for label, word in zip(labels, words, strict=True))
    return Scene(f"List:\n{listed}\n{first[0]}", first[1], more=tuple(more))


def image_list(random: np.random.RandomState) -> Scene:
    """What `images` shows, as text. Training alone draws it, to learn what is asked of pictures
    from words.
    """
    count = int(random.randint(2, 6))
    things = [(str(random.choice(SHAPES)), str(random.choice(list(COLORS)))) for _ in range(count)]
    answer = int(random.randint(count))
    things = [
        thing if place == answer else like(random, things[answer])
        for place, thing in enumerate(things)
    ]
    shown = [f"{color} {shape}" for shape, color in things]
    questions = [f"Which image shows a {thing}?" for thing in shown]
    listed = "\n".join(f"Image {place}: {thing}" for place, thing in enumerate(shown, 1))
    more = further(random, questions, shown, answer)
    return Scene(f"{listed}\n{questions[answer]}", str(answer + 1), more=more)
