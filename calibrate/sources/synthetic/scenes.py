"""Still scenes with a question and its answer: pages, tables, charts, sets of pictures, lists.

Each function takes a random stream and returns a `Scene`: raw pixels, before PNG, so that training
can use them as they are; `calibrate.sources.synthetic.kinds` encodes them into the messages that
every other part sees. Difficulty lives here: font sizes, how much else is on the page, how long a
list is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibrate.sources.synthetic.drawing import (
    CODE_LETTERS,
    COLORS,
    FACES,
    SHAPES,
    Color,
    Mark,
    Page,
    blank,
    text_width,
)

WORDS = """
about above across after again air almost along also animal answer apple around autumn away baker basket before begin
bell below bird boat book bottle branch bread bridge bright bring brother build butter candle carry castle chair change
circle clean clear clock cloud coast coin color copper corner cotton country cover create cross dance desk dinner
doctor door dream drive early earth east engine evening every family farm father field figure final finger fire flower
forest found fresh friend garden gentle glass grain grass great ground group happy harbor heavy hill hotel house iron
island jacket journey kitchen ladder lamp large leaf learn letter light linen listen little long machine market meadow
metal middle minute mirror money moon morning mother mountain music narrow needle never night north ocean office open
orange orchard other paper pencil people piano place plain plant plate pocket point pond poor rain reach ready river
road roof room round sailor salt school season second seven shadow ship shore short silver simple sister sleep slow
small smile snow soft song south spring stone store storm story street strong sugar summer supper table teach thick
thread ticket tower town train travel tree under valley village voice wagon walk wall warm watch water west wheat
wheel white wide wind window winter wonder wood wool world yard yellow young
""".split()

# (width, height), share. The last four make several tiles and a thumbnail; the odd ones are resized
# to one tile.
PAGE_SIZES = (
    ((256, 256), 0.64), ((240, 250), 0.08), ((280, 295), 0.08), ((512, 256), 0.06), ((256, 512), 0.06),
    ((250, 495), 0.03), ((512, 512), 0.05),
)  # fmt: skip
TILE = 256
"""Pixels of a tile of the tiny checkpoint. What is to be read is drawn for it: one or two
characters in the 32 pixels of a visual token."""


@dataclass(frozen=True)
class Picture:
    """Pixels, uint8 [height, width, 3], and what stands where on them."""

    pixels: np.ndarray
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Scene:
    """One item before encoding: `pictures` are images, or the frames of a clip when `moving`; text
    has none.

    `more` are further questions about the same pictures or list, with their answers. Training asks
    them in later turns; a sample asks the first alone.
    """

    question: str
    answer: str
    pictures: tuple[Picture, ...] = ()
    moving: bool = False
    more: tuple[tuple[str, str], ...] = ()


SceneMaker = Callable[[np.random.RandomState], Scene]


def finished(page: Page) -> Picture:
    """The page's pixels and marks."""
    return Picture(page.pixels, tuple(page.marks))


def choose(
    random: np.random.RandomState, options: tuple[tuple[tuple[int, int], float], ...]
) -> tuple[int, int]:
    """One of `options` by its share."""
    shares = np.array([share for _, share in options])
    return options[random.choice(len(options), p=shares / shares.sum())][0]


def code(random: np.random.RandomState, low: int, high: int) -> str:
    """`low` to `high` letters and digits that no word repeats."""
    return "".join(random.choice(list(CODE_LETTERS), random.randint(low, high + 1)))


def paper_and_ink(random: np.random.RandomState) -> tuple[Color, Color]:
    """A light paper and a dark ink, one page in eight the other way round."""
    light, dark = (
        tuple(int(v) for v in random.randint(*bounds, 3)) for bounds in ((225, 256), (0, 90))
    )
    return (dark, light) if random.rand() < 0.125 else (light, dark)  # type: ignore[return-value]


def _filler(random: np.random.RandomState, width: float, size: int, face: int) -> str:
    line = ""
    for word in random.choice(WORDS, 8):
        longer = f"{line} {word}".strip()
        if text_width(longer, size, face) > width:
            break
        line = longer
    return line


def document(random: np.random.RandomState) -> Scene:
    """A page of running text with one code of 5 or 6 characters under the word Code."""
    width, height = choose(random, PAGE_SIZES)
    paper, ink = paper_and_ink(random)
    page = blank(width, height, paper)
    # Inside one tile: no reader joins halves of a glyph that two tiles show.
    across, down = max(1, round(width / TILE)), max(1, round(height / TILE))
    wide, high = width / across, height / down
    answer, pen = code(random, 5, 6), _pen(random, wide / TILE)
    size, code_width = pen["size"], pen["pitch"] * 6
    corner = random.randint(across) * wide, random.randint(down) * high
    label = int(random.randint(18, 25))
    block = 1.1 * label + 1.3 * size
    top = corner[1] + random.uniform(2, high - block - 2)
    left = corner[0] + random.uniform(2, wide - code_width - 2)
    page.text(left + 6, top + 0.55 * label, "Code", label, ink, pen["face"])
    page.spaced(left, top + 1.1 * label + 0.65 * size, answer, ink=ink, **pen)
    _running_text(random, page, ink, pen["face"], (top, top + block))
    return Scene("What is the code on the page?", answer, (finished(page),))


def _pen(random: np.random.RandomState, scale: float = 1.0) -> dict[str, Any]:
    """Size, pitch and typeface of what is to be read: `spaced`'s arguments."""
    pitch = random.uniform(24, 36) * scale
    size = int(min(pitch * random.uniform(0.85, 1.05), 34 * scale))
    return {"size": size, "pitch": pitch, "face": int(random.randint(len(FACES)))}


def _running_text(
    random: np.random.RandomState, page: Page, ink: Color, face: int, taken: tuple[float, float]
) -> None:
    """Lines of words and numbers above and below the band `taken`, with gaps."""
    width, height = page.image.size
    y, kept = random.uniform(2, 30), random.uniform(0.3, 0.9)
    while y < height - 18:
        size = int(random.randint(12, 24))
        if y + 1.2 * size > taken[0] and y < taken[1]:
            y = taken[1] + random.uniform(0, 8)
            continue
        if random.rand() < kept:
            line = _filler(random, random.uniform(0.3, 0.95) * width, size, face)
            if random.rand() < 0.3:
                word = random.choice(["Page", "Total", "Order", "Note", "Date"])
                line = f"{word} {random.randint(1, 9999)}"
            left = random.uniform(4, max(5.0, width - text_width(line, size, face) - 4))
            page.text(left, y + 0.6 * size, line, size, ink, face)
        y += random.uniform(1.2, 1.8) * size


def table(random: np.random.RandomState) -> Scene:
    """Rows of a letter and a number; the question names a row."""
    width, height = choose(random, PAGE_SIZES[:3])
    paper, ink = paper_and_ink(random)
    page = blank(width, height, paper)
    rows = int(random.randint(3, 6))
    pen, step = _pen(random, width / TILE), (height - 36) / rows
    labels, values = (
        distinct_letters(random, rows),
        random.choice(np.arange(100, 1000), rows, replace=False),
    )
    left, right = random.uniform(4, 0.15 * width), random.uniform(0.35, 0.55) * width
    page.text(left, 18, "Item", 20, ink, pen["face"])
    page.text(right, 18, random.choice(["Price", "Value", "Total"]), 20, ink, pen["face"])
    for row, (label, value) in enumerate(zip(labels, values, strict=True)):
        y = 36 + step * (row + 0.5)
        page.pen.line((left, y - step / 2, width - left, y - step / 2), fill=ink, width=1)
        page.spaced(left, y, label, ink=ink, **pen)
        page.spaced(right, y, str(value), ink=ink, link=label, **pen)
    pairs = zip(labels, values, strict=True)
    questions = [(f"What is the value of item {label}?", str(value)) for label, value in pairs]
    return asking([questions[place] for place in random.permutation(rows)], page)


def distinct_letters(random: np.random.RandomState, count: int) -> list[str]:
    """Choose `count` letters that no typeface draws alike."""
    return [
        str(label) for label in random.choice(list("ABCDEFGHKLMNPRSTUVXYZ"), count, replace=False)
    ]


def asking(questions: list[tuple[str, str]], page: Page) -> Scene:
    """A scene of one page that asks the first of `questions`."""
    (question, answer), *more = questions
    return Scene(question, answer, (finished(page),), more=tuple(more))


def form(random: np.random.RandomState) -> Scene:
    """Lines of a letter and a code; the question names a line. Training alone draws it, to read
    more codes a page.
    """
    paper, ink = paper_and_ink(random)
    page = blank(TILE, TILE, paper)
    lines = int(random.randint(2, 7))
    labels, step, questions = distinct_letters(random, lines), TILE / lines, []
    for line, label in enumerate(labels):
        pen, word = _pen(random), code(random, 4, 6)
        y = step * (line + 0.5) + random.uniform(-0.5, 0.5) * (step - 38)
        left = random.uniform(0, TILE - (len(word) + 1) * pen["pitch"])
        page.spaced(left, y, label, ink=ink, **pen)
        page.spaced(left + pen["pitch"], y, word, ink=ink, link=label, **pen)
        questions.append((f"What is the code of {label}?", word))
    return asking([questions[place] for place in random.permutation(lines)], page)


def chart(random: np.random.RandomState) -> Scene:
    """Bars from a grid line 0 to their values, lines at 25, 50, 75 and 100: the largest one's
    letter, or a value.
    """
    width, height = choose(random, PAGE_SIZES[:3])
    paper, ink = paper_and_ink(random)
    page = blank(width, height, paper)
    bars = int(random.randint(3, 6))
    labels, values = (
        distinct_letters(random, bars),
        random.choice(np.arange(1, 101), bars, replace=False),
    )
    pen = _pen(random, width / TILE)
    page.text(
        random.uniform(4, 40),
        14,
        _filler(random, 0.8 * width, 18, pen["face"]),
        18,
        ink,
        pen["face"],
    )
    left = random.uniform(2, 10) + pen["pitch"]
    slot, longest = (height - 32) / bars, width - left - random.uniform(4, 30)
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = left + longest * share
        page.pen.line((x, 30, x, height - 4), fill=ink, width=1 if share else 2)
    thick, one_color = random.uniform(0.5, 0.8) * slot, random.rand() < 0.3
    colors = random.choice(list(COLORS), bars)
    for bar, (label, value) in enumerate(zip(labels, values, strict=True)):
        y, end = 32 + slot * (bar + 0.5), left + longest * value / 100
        page.bar(
            (left, y - thick / 2, end, y + thick / 2),
            COLORS[colors[0 if one_color else bar]],
            link=label,
        )
        page.spaced(left - pen["pitch"], y, label, ink=ink, **pen)
    largest = ("Which bar is the largest?", labels[int(np.argmax(values))])
    pairs = zip(labels, values, strict=True)
    questions = [(f"What is the value of bar {label}?", str(value)) for label, value in pairs]
    questions = [questions[place] for place in random.permutation(bars)]
    questions.insert(0 if random.rand() < 0.4 else 1, largest)
    return asking(questions, page)


def images(random: np.random.RandomState) -> Scene:
    """Two to four pictures of shapes or letters, each a little like the one asked for; the answer
    is its number.
    """
    count = int(random.randint(2, 5))
    answer = int(random.randint(count))
    lettered = random.rand() < 0.4
    if lettered:
        things: list[Any] = list(random.choice(list(CODE_LETTERS), count, replace=False))
        questions = [f"Which image shows the letter {thing}?" for thing in things]
    else:
        wanted = (str(random.choice(SHAPES)), str(random.choice(list(COLORS))))
        things = [wanted if place == answer else like(random, wanted) for place in range(count)]
        questions = [f"Which image shows a {color} {shape}?" for shape, color in things]
    pictures = []
    for thing in things:
        side = int(random.choice([256, 256, 192, 128]))
        paper, ink = paper_and_ink(random)
        page = blank(side, side, paper)
        if lettered:
            size = int(random.randint(28, 57) * side / TILE)
            x, y = random.uniform(0.05, 0.7, 2) * side
            page.spaced(
                x,
                y + 0.1 * side,
                str(thing),
                size,
                ink,
                1.1 * size,
                int(random.randint(len(FACES))),
            )
        else:
            extent = random.uniform(0.2, 0.5) * side
            x, y = random.uniform(0, side - extent, 2)
            page.shape(thing[0], (x, y, x + extent, y + extent), thing[1])
        pictures.append(finished(page))
    shown = [str(thing) if lettered else f"{thing[1]} {thing[0]}" for thing in things]
    return Scene(
        questions[answer],
        str(answer + 1),
        tuple(pictures),
        more=further(random, questions, shown, answer),
    )


def further(
    random: np.random.RandomState, questions: list[str], shown: list[str], answer: int
) -> tuple[tuple[str, str], ...]:
    """Other questions about the pictures, mixed and not all: asked in turn, the later ones fall to
    elimination.
    """
    more = [(question, str(place + 1)) for place, question in enumerate(questions)
            if place != answer and questions.count(question) == 1]  # fmt: skip
    more += [(f"What does image {place} show?", thing) for place, thing in enumerate(shown, 1)]
    return tuple(more[place] for place in random.permutation(len(more))[: len(shown)])


def like(random: np.random.RandomState, wanted: tuple[str, str]) -> tuple[str, str]:
    """A coloured shape that shares the shape, the colour or nothing with `wanted`, never both."""
    while True:
        kind = random.rand()
        shape = wanted[0] if kind < 0.35 else str(random.choice(SHAPES))
        color = wanted[1] if 0.35 <= kind < 0.7 else str(random.choice(list(COLORS)))
        if (shape, color) != wanted:
            return shape, color
