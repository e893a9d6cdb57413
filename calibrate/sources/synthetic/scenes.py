"""Draws still scenes with questions and answers: pages, tables, charts and sets of pictures.

Each function takes a random generator and returns a `Scene`. A scene holds raw pixels, so that
training uses them without encoding; `calibrate.sources.synthetic.kinds` encodes them into chat
messages for every other use. The order in which a function draws random numbers is part of its
result: if it changes, every item of every seed changes. How difficult the items are is set here, by
font sizes, by how much other text is on a page, and by how similar pictures are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from calibrate.sources.synthetic.drawing import (
    CODE_LETTERS,
    COLORS,
    FACES,
    SHAPES,
    Color,
    Lettering,
    Mark,
    Page,
    blank,
    text_width,
)

T = TypeVar("T")

WORDS = """
about above across after again air almost along also animal answer apple around autumn away baker
basket before begin bell below bird boat book bottle branch bread bridge bright bring brother build
butter candle carry castle chair change circle clean clear clock cloud coast coin color copper
corner cotton country cover create cross dance desk dinner doctor door dream drive early earth east
engine evening every family farm father field figure final finger fire flower forest found fresh
friend garden gentle glass grain grass great ground group happy harbor heavy hill hotel house iron
island jacket journey kitchen ladder lamp large leaf learn letter light linen listen little long
machine market meadow metal middle minute mirror money moon morning mother mountain music narrow
needle never night north ocean office open orange orchard other paper pencil people piano place
plain plant plate pocket point pond poor rain reach ready river road roof room round sailor salt
school season second seven shadow ship shore short silver simple sister sleep slow small smile snow
soft song south spring stone store storm story street strong sugar summer supper table teach thick
thread ticket tower town train travel tree under valley village voice wagon walk wall warm watch
water west wheat wheel white wide wind window winter wonder wood wool world yard yellow young
""".split()

TILE = 256
"""Pixels per side of a tile of the tiny checkpoint. Words that are to be read are sized for it: one
or two characters in the 32 pixels of a visual token."""

# Width and height of a page, and its share of the pages.
PageSizes = tuple[tuple[tuple[int, int], float], ...]
# Exactly one tile, and sizes that are resized to one tile.
ONE_TILE_SIZES: PageSizes = (
    ((256, 256), 0.64),
    ((240, 250), 0.08),
    ((280, 295), 0.08),
)
# Several tiles and a thumbnail; 250 x 495 is resized to two tiles.
LARGER_SIZES: PageSizes = (
    ((512, 256), 0.06),
    ((256, 512), 0.06),
    ((250, 495), 0.03),
    ((512, 512), 0.05),
)
PAGE_SIZES = ONE_TILE_SIZES + LARGER_SIZES

QuestionAnswer = tuple[str, str]


@dataclass(frozen=True)
class Picture:
    """An image, and the positions of what is drawn on it.

    Attributes:
        pixels: uint8 [height, width, 3].
        marks: One per glyph and shape.
    """

    pixels: np.ndarray
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Scene:
    """One item before encoding.

    Attributes:
        question: The first question.
        answer: Its answer.
        pictures: The images, or the frames of a clip; empty for a scene of text.
        moving: Whether `pictures` are the frames of a clip.
        more: Further questions about the same pictures or list, with their answers. Training uses
            them as later turns of the conversation; a sample has the first question only.
    """

    question: str
    answer: str
    pictures: tuple[Picture, ...] = ()
    moving: bool = False
    more: tuple[QuestionAnswer, ...] = ()


class ColoredShape(NamedTuple):
    """One of `SHAPES` in one of `COLORS`."""

    shape: str
    color: str

    @property
    def description(self) -> str:
        """The shape in words, such as "red star"."""
        return f"{self.color} {self.shape}"


SceneMaker = Callable[[np.random.RandomState], Scene]


def finished(page: Page) -> Picture:
    """Return the pixels and marks of a page."""
    return Picture(page.pixels, tuple(page.marks))


def asking(questions: Sequence[QuestionAnswer], page: Page) -> Scene:
    """Return a scene of one page whose first question is the first of `questions`."""
    question, answer = questions[0]
    return Scene(question, answer, (finished(page),), more=tuple(questions[1:]))


def shuffled(random: np.random.RandomState, values: Sequence[T]) -> list[T]:
    """Return `values` in random order."""
    return [values[place] for place in random.permutation(len(values))]


def choose(random: np.random.RandomState, options: PageSizes) -> tuple[int, int]:
    """Return the width and height of one of `options`, chosen by its share."""
    shares = np.array([share for _, share in options])
    chosen = random.choice(len(options), p=shares / shares.sum())
    return options[chosen][0]


def code(random: np.random.RandomState, low: int, high: int) -> str:
    """Return a random code of `low` to `high` letters and digits."""
    length = random.randint(low, high + 1)
    return "".join(random.choice(list(CODE_LETTERS), length))


def distinct_letters(random: np.random.RandomState, count: int) -> list[str]:
    """Return `count` different letters, none of which looks like another in any typeface."""
    return random.choice(list("ABCDEFGHKLMNPRSTUVXYZ"), count, replace=False).tolist()


def paper_and_ink(random: np.random.RandomState) -> tuple[Color, Color]:
    """Return a light paper and a dark ink; one page in eight has a dark paper and a light ink."""
    light = as_color(random.randint(225, 256, 3))
    dark = as_color(random.randint(0, 90, 3))
    if random.rand() < 0.125:
        return dark, light
    return light, dark


def as_color(channels: np.ndarray) -> Color:
    """Return the three channels of an array as a colour."""
    red, green, blue = channels.tolist()
    return red, green, blue


def _lettering(random: np.random.RandomState, scale: float = 1.0) -> Lettering:
    """Draw size, pitch and typeface of the words to be read.

    `scale` is the number of pixels of the page per pixel of the tile that the model gets.
    """
    pitch = random.uniform(24, 36) * scale
    size = int(min(pitch * random.uniform(0.85, 1.05), 34 * scale))
    face = int(random.randint(len(FACES)))
    return Lettering(size, pitch, face)


def _filler(random: np.random.RandomState, width: float, size: int, face: int) -> str:
    """Return a line of up to eight words that fits into `width` pixels."""
    line = ""
    for word in random.choice(WORDS, 8):
        longer = f"{line} {word}".strip()
        if text_width(longer, size, face) > width:
            break
        line = longer
    return line


def _running_text(
    random: np.random.RandomState, page: Page, ink: Color, face: int, taken: tuple[float, float]
) -> None:
    """Write lines of words and numbers, with gaps, above and below the band `taken`."""
    width, height = page.image.size
    band_top, band_bottom = taken
    y = random.uniform(2, 30)
    share_of_lines = random.uniform(0.3, 0.9)
    while y < height - 18:
        size = int(random.randint(12, 24))
        if y + 1.2 * size > band_top and y < band_bottom:
            y = band_bottom + random.uniform(0, 8)
            continue
        if random.rand() < share_of_lines:
            widest = random.uniform(0.3, 0.95) * width
            line = _filler(random, widest, size, face)
            if random.rand() < 0.3:
                word = random.choice(["Page", "Total", "Order", "Note", "Date"])
                number = random.randint(1, 9999)
                line = f"{word} {number}"
            rightmost = max(5.0, width - text_width(line, size, face) - 4)
            left = random.uniform(4, rightmost)
            page.text(left, y + 0.6 * size, line, size, ink, face)
        y += random.uniform(1.2, 1.8) * size


def document(random: np.random.RandomState) -> Scene:
    """Draw a page of running text that shows one code of 5 or 6 characters under the word Code."""
    width, height = choose(random, PAGE_SIZES)
    paper, ink = paper_and_ink(random)
    page = blank(width, height, paper)
    # The code lies inside one tile: a glyph that is cut in two by the border of two tiles cannot be
    # read from either.
    columns = max(1, round(width / TILE))
    rows = max(1, round(height / TILE))
    tile_width = width / columns
    tile_height = height / rows
    answer = code(random, 5, 6)
    lettering = _lettering(random, tile_width / TILE)
    tile_left = random.randint(columns) * tile_width
    tile_top = random.randint(rows) * tile_height
    title_size = int(random.randint(18, 25))
    block_width = 6 * lettering.pitch
    block_height = 1.1 * title_size + 1.3 * lettering.size
    top = tile_top + random.uniform(2, tile_height - block_height - 2)
    left = tile_left + random.uniform(2, tile_width - block_width - 2)
    page.text(left + 6, top + 0.55 * title_size, "Code", title_size, ink, lettering.face)
    middle = top + 1.1 * title_size + 0.65 * lettering.size
    page.spaced(left, middle, answer, ink, lettering)
    _running_text(random, page, ink, lettering.face, (top, top + block_height))
    return Scene("What is the code on the page?", answer, (finished(page),))


def table(random: np.random.RandomState) -> Scene:
    """Draw a table of letters and numbers; each question is about one row."""
    width, height = choose(random, ONE_TILE_SIZES)
    paper, ink = paper_and_ink(random)
    page = blank(width, height, paper)
    rows = int(random.randint(3, 6))
    lettering = _lettering(random, width / TILE)
    row_height = (height - 36) / rows
    labels = distinct_letters(random, rows)
    values = random.choice(np.arange(100, 1000), rows, replace=False)
    left = random.uniform(4, 0.15 * width)
    right = random.uniform(0.35, 0.55) * width
    header = random.choice(["Price", "Value", "Total"])
    page.text(left, 18, "Item", 20, ink, lettering.face)
    page.text(right, 18, header, 20, ink, lettering.face)
    questions = []
    for row, (label, value) in enumerate(zip(labels, values, strict=True)):
        y = 36 + row_height * (row + 0.5)
        above = y - row_height / 2
        page.pen.line((left, above, width - left, above), fill=ink, width=1)
        page.spaced(left, y, label, ink, lettering)
        page.spaced(right, y, str(value), ink, lettering, link=label)
        questions.append((f"What is the value of item {label}?", str(value)))
    return asking(shuffled(random, questions), page)


def form(random: np.random.RandomState) -> Scene:
    """Draw lines of a letter and a code; each question is about one line.

    Only training uses it, because it has more codes per page than `document`.
    """
    paper, ink = paper_and_ink(random)
    page = blank(TILE, TILE, paper)
    lines = int(random.randint(2, 7))
    labels = distinct_letters(random, lines)
    line_height = TILE / lines
    questions = []
    for line, label in enumerate(labels):
        lettering = _lettering(random)
        word = code(random, 4, 6)
        y = line_height * (line + 0.5) + random.uniform(-0.5, 0.5) * (line_height - 38)
        left = random.uniform(0, TILE - (len(word) + 1) * lettering.pitch)
        page.spaced(left, y, label, ink, lettering)
        page.spaced(left + lettering.pitch, y, word, ink, lettering, link=label)
        questions.append((f"What is the code of {label}?", word))
    return asking(shuffled(random, questions), page)


def chart(random: np.random.RandomState) -> Scene:
    """Draw a chart of horizontal bars with grid lines at 0, 25, 50, 75 and 100.

    Questions are about the value of each bar and about the letter of the largest one.
    """
    width, height = choose(random, ONE_TILE_SIZES)
    paper, ink = paper_and_ink(random)
    page = blank(width, height, paper)
    bars = int(random.randint(3, 6))
    labels = distinct_letters(random, bars)
    values = random.choice(np.arange(1, 101), bars, replace=False)
    lettering = _lettering(random, width / TILE)
    title_left = random.uniform(4, 40)
    title = _filler(random, 0.8 * width, 18, lettering.face)
    page.text(title_left, 14, title, 18, ink, lettering.face)
    left = random.uniform(2, 10) + lettering.pitch
    longest = width - left - random.uniform(4, 30)
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = left + longest * share
        line_width = 2 if share == 0 else 1
        page.pen.line((x, 30, x, height - 4), fill=ink, width=line_width)
    slot = (height - 32) / bars
    thickness = random.uniform(0.5, 0.8) * slot
    one_color = random.rand() < 0.3
    colors = list(random.choice(list(COLORS), bars))
    if one_color:
        colors = [colors[0]] * bars
    questions = []
    for bar, (label, value) in enumerate(zip(labels, values, strict=True)):
        y = 32 + slot * (bar + 0.5)
        end = left + longest * value / 100
        box = (left, y - thickness / 2, end, y + thickness / 2)
        page.bar(box, COLORS[colors[bar]], link=label)
        page.spaced(left - lettering.pitch, y, label, ink, lettering)
        questions.append((f"What is the value of bar {label}?", str(value)))
    questions = shuffled(random, questions)
    place_of_largest = 0 if random.rand() < 0.4 else 1
    largest = labels[int(np.argmax(values))]
    questions.insert(place_of_largest, ("Which bar is the largest?", largest))
    return asking(questions, page)


def images(random: np.random.RandomState) -> Scene:
    """Draw two to four pictures of letters or shapes; the answer is the number of one picture.

    Pictures of shapes share the shape or the colour with the one that the question describes.
    """
    count = int(random.randint(2, 5))
    answer = int(random.randint(count))
    if random.rand() < 0.4:
        shown = random.choice(list(CODE_LETTERS), count, replace=False).tolist()
        questions = [f"Which image shows the letter {letter}?" for letter in shown]
        pictures = [_picture_of_letter(random, letter) for letter in shown]
    else:
        things = _similar_shapes(random, count, answer)
        shown = [thing.description for thing in things]
        questions = [f"Which image shows a {description}?" for description in shown]
        pictures = [_picture_of_shape(random, thing) for thing in things]
    more = further(random, questions, shown, answer)
    return Scene(questions[answer], str(answer + 1), tuple(pictures), more=more)


def _similar_shapes(random: np.random.RandomState, count: int, answer: int) -> list[ColoredShape]:
    """Draw a shape for place `answer`, and one that is like it for every other place."""
    shape = str(random.choice(SHAPES))
    color = str(random.choice(list(COLORS)))
    wanted = ColoredShape(shape, color)
    things = []
    for place in range(count):
        if place == answer:
            things.append(wanted)
        else:
            things.append(like(random, wanted))
    return things


def _blank_picture(random: np.random.RandomState) -> tuple[Page, Color]:
    """Return an empty square page, of one tile or smaller, and its ink."""
    side = int(random.choice([256, 256, 192, 128]))
    paper, ink = paper_and_ink(random)
    return blank(side, side, paper), ink


def _picture_of_letter(random: np.random.RandomState, letter: str) -> Picture:
    page, ink = _blank_picture(random)
    side = page.image.width
    size = int(random.randint(28, 57) * side / TILE)
    x, y = random.uniform(0.05, 0.7, 2) * side
    face = int(random.randint(len(FACES)))
    page.spaced(x, y + 0.1 * side, letter, ink, Lettering(size, 1.1 * size, face))
    return finished(page)


def _picture_of_shape(random: np.random.RandomState, thing: ColoredShape) -> Picture:
    page, _ = _blank_picture(random)
    side = page.image.width
    extent = random.uniform(0.2, 0.5) * side
    x, y = random.uniform(0, side - extent, 2)
    page.shape(thing.shape, (x, y, x + extent, y + extent), thing.color)
    return finished(page)


def further(
    random: np.random.RandomState, questions: list[str], shown: list[str], answer: int
) -> tuple[QuestionAnswer, ...]:
    """Draw further questions about a set of pictures, as many as there are pictures.

    They are a random part of all questions in random order. If all were used in order, the last
    ones could be answered by elimination, without looking.

    Args:
        random: Random generator.
        questions: The question that each picture answers.
        shown: What each picture shows.
        answer: Place of the picture that answers the first question, which is not repeated.
    """
    more = []
    for place, question in enumerate(questions):
        has_one_answer = questions.count(question) == 1
        if place != answer and has_one_answer:
            more.append((question, str(place + 1)))
    for number, thing in enumerate(shown, 1):
        more.append((f"What does image {number} show?", thing))
    return tuple(shuffled(random, more)[: len(shown)])


def like(random: np.random.RandomState, wanted: ColoredShape) -> ColoredShape:
    """Draw a coloured shape other than `wanted`; it may have the same shape or the same colour."""
    while True:
        kind = random.rand()
        same_shape = kind < 0.35
        same_color = 0.35 <= kind < 0.7
        shape = wanted.shape if same_shape else str(random.choice(SHAPES))
        color = wanted.color if same_color else str(random.choice(list(COLORS)))
        drawn = ColoredShape(shape, color)
        if drawn != wanted:
            return drawn
