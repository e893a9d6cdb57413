"""Draws lists as text, one line an entry, and asks for one of them."""

from __future__ import annotations

import numpy as np

from calibrate.drawing import COLORS, SHAPES
from calibrate.scenes import Scene, code, distinct_letters, further, like


def text(random: np.random.RandomState, pairs: int | None = None) -> Scene:
    """Recall from a list of `pairs` keys and values (4 to 360 when not given; 300 pairs are over 2,000 tokens)."""
    if pairs is None:
        pairs = int(random.randint(300, 361)) if random.rand() < 0.25 else int(2 ** random.uniform(2, 7.5))
    letters = "abcdefghijklmnopqrstuvwxyz"
    keys = [letters[number // 26] + letters[number % 26] for number in random.permutation(26 * 26)[:pairs]]
    values = random.randint(100, 1000, pairs)
    lines = "\n".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    asked = random.permutation(pairs)[:12]
    first, *more = [(f"What is the value of {keys[place]}?", str(values[place])) for place in asked]
    return Scene(f"List:\n{lines}\n{first[0]}", first[1], more=tuple(more))


def code_list(random: np.random.RandomState) -> Scene:
    """Recall of codes from a list: what `form` shows on a page, as text. Training alone draws it."""
    lines = int(random.randint(2, 13))
    labels = distinct_letters(random, lines)
    words = [code(random, 4, 6) for _ in labels]
    questions = [(f"What is the code of {label}?", word) for label, word in zip(labels, words, strict=True)]
    first, *more = [questions[place] for place in random.permutation(lines)]
    listed = "\n".join(f"{label} {word}" for label, word in zip(labels, words, strict=True))
    return Scene(f"List:\n{listed}\n{first[0]}", first[1], more=tuple(more))


def image_list(random: np.random.RandomState) -> Scene:
    """What `images` shows, as text. Training alone draws it, to learn what is asked of pictures from words."""
    count = int(random.randint(2, 6))
    things = [(str(random.choice(SHAPES)), str(random.choice(list(COLORS)))) for _ in range(count)]
    answer = int(random.randint(count))
    things = [thing if place == answer else like(random, things[answer]) for place, thing in enumerate(things)]
    shown = [f"{color} {shape}" for shape, color in things]
    questions = [f"Which image shows a {thing}?" for thing in shown]
    listed = "\n".join(f"Image {place}: {thing}" for place, thing in enumerate(shown, 1))
    more = further(random, questions, shown, answer)
    return Scene(f"{listed}\n{questions[answer]}", str(answer + 1), more=more)
