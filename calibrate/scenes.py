"""Still scenes with a question and its answer: pages, tables, charts, sets of pictures, lists.

Each function takes a random stream and returns a `Scene`: raw pixels, before PNG, so that training can use them as
they are; `calibrate.synthetic` encodes them into the messages that every other part sees. Difficulty lives here: font
sizes, how much else is on the page, how long a list is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibrate.drawing import CODE_LETTERS, COLORS, SHAPES, Color, Mark, Page, blank, text_width

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

# (width, height), share. The last four make several tiles and a thumbnail; the odd ones are resized to one tile.
PAGE_SIZES = (
    ((512, 512), 0.62), ((480, 500), 0.08), ((560, 590), 0.08), ((1024, 512), 0.08), ((512, 1024), 0.08),
    ((500, 990), 0.03), ((1024, 1024), 0.03),
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """Pixels, uint8 [height, width, 3], and what stands where on them."""

    pixels: np.ndarray
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Scene:
    """One item before encoding: `pictures` are images, or the frames of a clip when `moving`; text has none.

    `more` are further questions about the same pictures or list, with their answers. Training asks them in later turns;
    a sample asks the first alone.
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


def choose(random: np.random.RandomState, options: tuple[tuple[tuple[int, int], float], ...]) -> tuple[int, int]:
    """One of `options` by its share."""
    shares = np.array([share for _, share in options])
    return options[random.choice(len(options), p=shares / shares.sum())][0]


def code(random: np.random.RandomState, low: int, high: int) -> str:
    """`low` to `high` letters and digits that no word repeats."""
    return "".join(random.choice(list(CODE_LETTERS), random.randint(low, high + 1)))


def paper_and_ink(random: np.random.RandomState) -> tuple[Color, Color]:
    """A light paper and a dark ink, one page in eight the other way round."""
    light, dark = (tuple(int(v) for v in random.randint(*bounds, 3)) for bounds in ((225, 256), (0, 90)))
    return (dark, light) if random.rand() < 0.125 else (light, dark)  # type: ignore[return-value]


def _filler(random: np.random.RandomState, width: float, size: int) -> str:
    line = ""
    for word in random.choice(WORDS, 8):
        longer = f"{line} {word}".strip()
        if text_width(longer, size) > width:
            break
        line = longer
    return line


def document(random: np.random.RandomState) -> Scene:
    """A page of running text with one code of 5 or 6 characters behind or under the word Code."""
    width, height = choose(random, PAGE_SIZES)
    paper, ink = paper_and_ink(random)
    page = blank(width, height, paper)
    answer = code(random, 5, 6)
    size = int(random.randint(30, 57))
    if width > 800 and random.rand() < 0.7:
        size = int(random.randint(44, 65))
    stacked = random.rand() < 0.3
    label_width = text_width("Code: ", size)
    block = (2.3 if stacked else 1.3) * size
    code_width = text_width(answer, size) + (0 if stacked else label_width)
    top = random.uniform(8, height - block - 8)
    left = random.uniform(8, max(9.0, width - code_width - 8))
    if stacked:
        page.text(left, top + 0.65 * size, "Code", size, ink)
        page.text(left, top + 1.65 * size, answer, size, ink, word=True)
    else:
        page.text(left, top + 0.65 * size, "Code:", size, ink)
        page.text(left + label_width, top + 0.65 * size, answer, size, ink, word=True)
    _running_text(random, page, ink, (top, top + block))
    return Scene("What is the code on the page?", answer, (finished(page),))


def _running_text(random: np.random.RandomState, page: Page, ink: Color, taken: tuple[float, float]) -> None:
    """Lines of words and numbers above and below the band `taken`, with gaps."""
    width, height = page.image.size
    y, kept = random.uniform(4, 40), random.uniform(0.3, 0.9)
    while y < height - 24:
        size = int(random.randint(16, 40))
        if y + 1.2 * size > taken[0] and y < taken[1]:
            y = taken[1] + random.uniform(0, 8)
            continue
        if random.rand() < kept:
            line = _filler(random, random.uniform(0.3, 0.95) * width, size)
            if random.rand() < 0.3:
                word = random.choice(["Page", "Total", "Order", "Note", "Date"])
                line = f"{word} {random.randint(1, 9999)}"
            page.text(random.uniform(4, max(5.0, width - text_width(line, size) - 4)), y + 0.6 * size, line, size, ink)
        y += random.uniform(1.2, 1.8) * size


def table(random: np.random.RandomState) -> Scene:
    """Rows of a letter and a number; the question names a row."""
    width, height = choose(random, PAGE_SIZES[:3])
    paper, ink = paper_and_ink(random)
    page = blank(width, height, paper)
    rows = int(random.randint(3, 7))
    step = (height - 70) / rows
    size = int(random.randint(30, min(49, int(step / 1.2))))
    labels = random.choice(list("ABCDEFGHKLMNPRSTUVXYZ"), rows, replace=False)
    values = random.choice(np.arange(100, 1000), rows, replace=False)
    left, right = random.uniform(30, 0.3 * width), random.uniform(0.5, 0.65) * width
    page.text(left, 36, "Item", 32, ink)
    page.text(right, 36, random.choice(["Price", "Value", "Total"]), 32, ink)
    for row, (label, value) in enumerate(zip(labels, values, strict=True)):
        y = 60 + step * (row + 0.5)
        page.pen.line((left - 12, y - step / 2, right + 100, y - step / 2), fill=ink, width=2)
        page.text(left, y, str(label), size, ink, word=True)
        page.text(right, y, str(value), size, ink, word=True, link=str(label))
    pairs = zip(labels, values, strict=True)
    questions = [(f"What is the value of item {label}?", str(value)) for label, value in pairs]
    return asking([questions[place] for place in random.permutation(rows)], page)


def asking(questions: list[tuple[str, str]], page: Page) -> Scene:
    """A scene of one page that asks the first of `questions`."""
    (question, answer), *more = questions
    return Scene(question, answer, (finished(page),), more=tuple(more))


def form(random: np.random.RandomState) -> Scene:
    """Lines of a letter and a code; the question names a line. Training alone draws it, to read more codes a page."""
    paper, ink = paper_and_ink(random)
    page = blank(512, 512, paper)
    lines = int(random.randint(3, 7))
    labels = random.choice(list("ABCDEFGHKLMNPRSTUVXYZ"), lines, replace=False)
    step, questions = 512 / lines, []
    for line, label in enumerate(labels):
        size, word = int(random.randint(30, min(57, int(step / 1.3)))), code(random, 4, 6)
        y, gap = step * (line + 0.5) + random.uniform(-0.1, 0.1) * step, text_width(f"{label}: ", size)
        left = random.uniform(6, max(7.0, 506 - gap - text_width(word, size)))
        page.text(left, y, str(label), size, ink, word=True)
        page.text(left + gap, y, word, size, ink, word=True, link=str(label))
        questions.append((f"What is the code of {label}?", word))
    return asking([questions[place] for place in random.permutation(lines)], page)


def chart(random: np.random.RandomState) -> Scene:
    """A bar chart with lettered bars and their values on top: the largest bar's letter, or one bar's value."""
    width, height = choose(random, (*PAGE_SIZES[:3], ((1024, 512), 0.06)))
    paper, ink = paper_and_ink(random)
    page = blank(width, height, paper)
    bars = int(random.randint(3, 7))
    labels = random.choice(list("ABCDEFGHKLMNPRSTUVXYZ"), bars, replace=False)
    values = _apart(random, bars)
    base, top = height - random.uniform(60, 90), random.uniform(95, 140)
    left, right = random.uniform(16, 60), width - random.uniform(16, 60)
    slot = (right - left) / bars
    size = int(random.randint(28, min(44, int(slot / 1.5)) + 1))
    page.text(left, random.uniform(22, 40), _filler(random, 0.8 * width, 26), 26, ink)
    page.pen.line((left, base, right, base), fill=ink, width=3)
    thick, one_color = random.uniform(0.5, 0.8), random.rand() < 0.3
    colors = random.choice(list(COLORS), bars)
    for bar, (label, value) in enumerate(zip(labels, values, strict=True)):
        middle, high = left + slot * (bar + 0.5), base - (base - top) * value / 100
        fill = COLORS[colors[0 if one_color else bar]]
        page.pen.rectangle((middle - slot * thick / 2, high, middle + slot * thick / 2, base), fill=fill)
        page.text(middle - text_width(label, size) / 2, base + 0.75 * size, str(label), size, ink, word=True)
        number = str(value)
        page.text(middle - text_width(number, size) / 2, high - 0.6 * size, number, size, ink, True, str(label))
    largest = ("Which bar is the largest?", str(labels[int(np.argmax(values))]))
    pairs = zip(labels, values, strict=True)
    questions = [(f"What is the value of bar {label}?", str(value)) for label, value in pairs]
    questions = [questions[place] for place in random.permutation(bars)]
    questions.insert(0 if random.rand() < 0.4 else 1, largest)
    return asking(questions, page)


def _apart(random: np.random.RandomState, count: int) -> np.ndarray:
    """`count` values of 10 to 99 of which the largest leads by at least 4."""
    while True:
        values = random.choice(np.arange(10, 100), count, replace=False)
        ordered = np.sort(values)
        if ordered[-1] - ordered[-2] >= 4:
            return values


def images(random: np.random.RandomState) -> Scene:
    """Two to four pictures of shapes or letters, each a little like the one asked for; the answer is its number."""
    count = int(random.randint(2, 5))
    answer = int(random.randint(count))
    lettered = random.rand() < 0.4
    if lettered:
        things: list[Any] = list(random.choice(list(CODE_LETTERS), count, replace=False))
        questions = [f"Which image shows the letter {thing}?" for thing in things]
    else:
        wanted = (str(random.choice(SHAPES)), str(random.choice(list(COLORS))))
        things = [wanted if place == answer else _like(random, wanted) for place in range(count)]
        questions = [f"Which image shows a {color} {shape}?" for shape, color in things]
    pictures = []
    for thing in things:
        side = int(random.choice([512, 512, 384, 256]))
        paper, ink = paper_and_ink(random)
        page = blank(side, side, paper)
        if lettered:
            size = int(random.randint(40, 120) * side / 512)
            x, y = random.uniform(0.05, 0.7, 2) * side
            page.text(x, y + 0.1 * side, str(thing), size, ink, word=True)
        else:
            extent = random.uniform(0.15, 0.45) * side
            x, y = random.uniform(0, side - extent, 2)
            page.shape(thing[0], (x, y, x + extent, y + extent), thing[1])
        pictures.append(finished(page))
    more = [(question, str(place + 1)) for place, question in enumerate(questions)
            if place != answer and questions.count(question) == 1]  # fmt: skip
    return Scene(questions[answer], str(answer + 1), tuple(pictures), more=tuple(more))


def _like(random: np.random.RandomState, wanted: tuple[str, str]) -> tuple[str, str]:
    """A coloured shape that shares the shape, the colour or nothing with `wanted`, never both."""
    while True:
        kind = random.rand()
        shape = wanted[0] if kind < 0.35 else str(random.choice(SHAPES))
        color = wanted[1] if 0.35 <= kind < 0.7 else str(random.choice(list(COLORS)))
        if (shape, color) != wanted:
            return shape, color


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
