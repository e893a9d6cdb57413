"""Training batches for `tiny.training.train`: scenes of the tasks as tokens, uint8 tiles and dense
labels.

Every question that a scene can answer is asked, one turn after the other: with one answer a page,
most of what goes through the GPU would teach nothing.

PNG is lossless, so stills skip it; a quarter of the clips go through the MP4 encoder and decoder,
as all test clips do. The prompts are those of `calibrate.prompts`, which a test holds them to; they
are built here from raw pixels because encoding, decoding and normalising in float32 on the host
would keep the GPU waiting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from calibrate.sources.synthetic.clips import FPS
from calibrate.sources.synthetic.drawing import BAR_END, COLORS, SHAPES, mp4_bytes, random_state
from calibrate.sources.synthetic.kinds import KINDS
from calibrate.sources.synthetic.lists import code_list, frequent, image_list, recall
from calibrate.sources.synthetic.scenes import Picture, Scene, form
from calibrate.tiles import tile_grid
from calibrate.video import decode
from checkpoint.config import CheckpointConfig
from tiny.tasks import series

# Share of items. A clip has several times the tokens of a page, so clips take a third of the tokens
# all the same.
SHARES = {
    "document": 0.15,
    "form": 0.17,
    "chart": 0.18,
    "table": 0.03,
    "images": 0.12,
    "video_event": 0.10,
    "video_static": 0.06,
    "recall": 0.11,
    "code_list": 0.05,
    "image_list": 0.03,
}
# Of the second stage: a trained checkpoint learns to compare in a minute; the rest of the time
# sharpens it.
SECOND_SHARES = {
    "document": 0.10,
    "form": 0.08,
    "chart": 0.10,
    "table": 0.02,
    "images": 0.08,
    "video_event": 0.08,
    "video_static": 0.05,
    "recall": 0.05,
    "frequent": 0.40,
    "code_list": 0.02,
    "image_list": 0.02,
}
_TEXTS = ("recall", "frequent", "code_list", "image_list")
# While the tower learns to read alone, the language model has lists to learn recall from.
EASY_TEXT = 0.5
_EASY = 0.2
_ALONE = {
    "form": form,
    "recall": recall,
    "frequent": frequent,
    "code_list": code_list,
    "image_list": image_list,
}
_MAKERS = KINDS | _ALONE
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_GLYPHS = [*CHARACTERS, *SHAPES, BAR_END]
# What a visual token is taught to be alike to: characters, shapes and, last, colours.
NAMES = (*CHARACTERS, *SHAPES, *COLORS)
# Classes of a patch: nothing, running text, or a glyph; which place in its word; what it is linked
# to.
GLYPH_CLASSES = {name: number for number, name in enumerate(_GLYPHS, 2)}
LINK_CLASSES = {
    name: number for number, name in enumerate([*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *COLORS], 1)
}
LABEL_SIZES = (len(_GLYPHS) + 2, 8, len(LINK_CLASSES) + 1)
IGNORED = 255
# Batches come in few shapes, each a CUDA graph: tokens of an item, answer tokens of a text and of
# another item.
LENGTHS = (128, 224, 288, 384, 448, 512, 704, 896, 1152, 1408, 2048, 2944)
QUESTIONS, TEXT_ANSWER, OTHER_ANSWER = 12, 96, 56


@dataclass(frozen=True)
class Item:
    """One training item.

    Attributes:
        kind: Of `SHARES`.
        token_ids: Prompt, answer and end of turn, and so on for every question.
        answers: Where each answer and its end of turn stand: (start, end).
        tiles: uint8 [tiles, side, side, 3]; a clip's frames are one tile each.
        labels: uint8 [tiles, patches, patches, 3]: glyph, place in its word and link of every
            patch.
    """

    kind: str
    token_ids: list[int]
    answers: list[tuple[int, int]]
    tiles: np.ndarray
    labels: np.ndarray


class Batch(NamedTuple):
    """Items with equally many tiles; answer tokens are padded, so that batches of a kind have one
    shape.

    Attributes:
        kinds: Of every question of every item.
        tokens: int64 [items, length], padded with 0.
        rows: int64 [answer tokens]: the item of each token to be predicted.
        columns: int64 [answer tokens]: its place in the item, at least 1.
        question: int64 [answer tokens]: its place in `kinds`; for padding, the number of questions
            there is room for.
        places: int64 [visual tokens]: where they stand in the flattened `tokens`.
        tiles: uint8 [tiles of all items, side, side, 3].
        labels: uint8 [tiles of all items, patches, patches, 3].
        moving: Whether the items are clips.
    """

    kinds: list[str]
    tokens: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    question: torch.Tensor
    places: torch.Tensor
    tiles: torch.Tensor
    labels: torch.Tensor
    moving: bool

    @property
    def items(self) -> int:
        """How many items."""
        return len(self.tokens)

    @property
    def questions(self) -> int:
        """How many questions there is room for."""
        return QUESTIONS * self.items

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that goes to the device."""
        return self[1:8]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Batch:
        """The same batch on another device."""
        tokens, rows, columns, question, places, tiles, labels = tensors
        return Batch(
            self.kinds, tokens, rows, columns, question, places, tiles, labels, self.moving
        )


class PromptBuilder:
    """Turns scenes into token ids as `calibrate.prompts.build_prompt` turns samples."""

    def __init__(self, config: CheckpointConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.video_id = config.raw["video_context_token_id"]
        self.end = [*self._ids("\n"), config.text["eos_token_id"]]
        self.turn = "\n<SPECIAL_11>User\n{}\n<SPECIAL_11>Assistant\n<think></think>"
        start, end = (self._ids(config.raw[key]) for key in ("img_start_token", "img_end_token"))
        self.bracketed = lambda tiles: [
            *start,
            *[config.image_token_id] * (tiles * config.tokens_per_tile),
            *end,
        ]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def tokens(
        self, scene: Scene, tiles: list[int], turns: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of prompt, answer and end of turn, and where the answers stand.

        Args:
            scene: The scene.
            tiles: Tiles of each picture; not asked of a clip.
            turns: Ask the further questions too.
        """
        parts: list[dict[str, str]] = [{"type": "video"}] if scene.moving else []
        for number in range(1, 1 + (0 if scene.moving else len(scene.pictures))):
            if len(scene.pictures) > 1:
                parts.append({"type": "text", "text": f"Image {number}: "})
            parts.append({"type": "image"})
        parts.append({"type": "text", "text": ("\n" if parts else "") + scene.question})
        conversation: list[Any] = [{"role": "system", "content": [{"type": "text", "text": "/no_think"}]},
                                   {"role": "user", "content": parts}]  # fmt: skip
        rendered = self.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        left, built = list(tiles), list[int]()
        for token in self._ids(str(rendered)):
            if token == self.config.image_token_id:
                built += self.bracketed(left.pop(0))
            elif token == self.video_id:
                for frame in range(len(scene.pictures)):
                    separator = "" if frame == 0 else "\n"
                    seconds = frame * int(1000 / FPS) / 1000
                    built += self._ids(
                        f"{separator}Frame {frame + 1} sampled at {seconds:.2f} seconds: "
                    )
                    built += self.bracketed(1)
            else:
                built.append(token)
        answers = []
        for place, (question, answer) in enumerate(
            [("", scene.answer), *(scene.more if turns else ())]
        ):
            built += self._ids(self.turn.format(question)) if place else []
            start = len(built)
            built += [*self._ids(answer), *self.end]
            answers.append((start, len(built)))
        return built, answers


def cut(picture: Picture, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiles and labels of a picture, the thumbnail last when there are several tiles.

    Returns:
        uint8 [tiles, size, size, 3] and uint8 [tiles, size / 16, size / 16, 3].
    """
    height, width = picture.pixels.shape[:2]
    cols, rows = tile_grid(width, height, size)
    whole = _resized(picture.pixels, cols * size, rows * size)
    tiles = whole.reshape(rows, size, cols, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    labels = patch_labels(picture, rows * size // 16, cols * size // 16)
    side = size // 16
    labels = labels.reshape(rows, side, cols, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    if len(tiles) > 1:
        tiles = np.concatenate([tiles, _resized(picture.pixels, size, size)[None]])
        labels = np.concatenate([labels, patch_labels(picture, side, side)[None]])
    return tiles, labels


def _resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def patch_labels(picture: Picture, rows: int, cols: int) -> np.ndarray:
    """Which glyph has its centre in each patch: uint8 [rows, cols, 3]; glyphs outside words that
    could be codes too are ignored rather than guessed, and what a thumbnail shows too small to read
    counts as running text."""
    labels = np.zeros((rows, cols, 3), np.uint8)
    height, width = picture.pixels.shape[:2]
    small = min(rows / height, cols / width) * 16 < 0.75
    for mark in picture.marks:
        row = min(rows - 1, max(0, int(mark.y / height * rows)))
        col = min(cols - 1, max(0, int(mark.x / width * cols)))
        if small and mark.name not in SHAPES:
            labels[row, col] = (1, 0, 0)
        elif mark.index or mark.name in SHAPES:
            labels[row, col] = (
                GLYPH_CLASSES[mark.name],
                mark.index,
                LINK_CLASSES.get(mark.link, 0),
            )
        else:
            labels[row, col] = (1, 0, 0) if mark.name.islower() else IGNORED
    return labels


def make_item(
    scene: Scene, kind: str, builder: PromptBuilder, compressed: bool, turns: bool = False
) -> Item:
    """Tokens, tiles and labels of a scene; a clip's frames through MP4 and back when `compressed`."""
    size = builder.config.tile_size
    if scene.moving:
        frames = np.stack([picture.pixels for picture in scene.pictures])
        if compressed:
            frames = decode(mp4_bytes(frames, FPS), "training clip").frames
        tiles, counts = frames, list[int]()
        labels = np.stack(
            [patch_labels(picture, size // 16, size // 16) for picture in scene.pictures]
        )
    else:
        cuts = [cut(picture, size) for picture in scene.pictures]
        counts = [len(tiles) for tiles, _ in cuts]
        tiles = (
            np.concatenate([t for t, _ in cuts]) if cuts else np.empty((0, size, size, 3), np.uint8)
        )
        labels = (
            np.concatenate([la for _, la in cuts])
            if cuts
            else np.empty((0, size // 16, size // 16, 3), np.uint8)
        )
    token_ids, answers = builder.tokens(scene, counts, turns)
    return Item(kind, token_ids, answers, tiles, labels)


def padded_length(item: Item) -> int:
    """The smallest of `LENGTHS` that holds an item."""
    return next(fitting for fitting in LENGTHS if fitting >= len(item.token_ids))


def collate(items: list[Item], visual_id: int, length: int = 0, answer_tokens: int = 0) -> Batch:
    """Stack items with equally many tiles.

    Args:
        items: At least one.
        visual_id: The token that stands for a visual one.
        length: Tokens to pad every item to; 0 for the longest one's.
        answer_tokens: Answer tokens to pad to; 0 for none more than there are.
    """
    length = length or max(len(item.token_ids) for item in items)
    tokens = torch.zeros(len(items), length, dtype=torch.int64)
    kinds, wanted = list[str](), list[tuple[int, int, int]]()
    for row, item in enumerate(items):
        tokens[row, : len(item.token_ids)] = torch.tensor(item.token_ids)
        for start, end in item.answers:
            wanted += [(row, column, len(kinds)) for column in range(start, end)]
            kinds.append(item.kind)
    wanted += [(0, 1, QUESTIONS * len(items))] * (answer_tokens - len(wanted))
    tiles, labels = (torch.from_numpy(np.concatenate([getattr(item, name) for item in items]))
                     for name in ("tiles", "labels"))  # fmt: skip
    rows, columns, question = torch.tensor(wanted).unbind(1)
    places = (tokens.flatten() == visual_id).nonzero()[:, 0]
    moving = items[0].kind.startswith("video")
    return Batch(kinds, tokens, rows, columns, question, places, tiles, labels, moving)


class Batches(IterableDataset[Batch]):
    """Endless batches of about `tokens` tokens, each worker from its own indices of the training
    series.

    Args:
        builder: Makes the prompts.
        seed: Of the training series.
        start: Names the stretch of the run, so that a resumed run sees new items.
        tokens: Tokens of a batch.
        done: Share of the run that is over; over the first fifth lists and clips grow from short to
            their full length.
        shares: Of items, by kind.
    """

    def __init__(
        self,
        builder: PromptBuilder,
        seed: int,
        start: int,
        tokens: int,
        done: Any,
        shares: Mapping[str, float],
    ) -> None:
        self.builder, self.seed, self.start, self.tokens, self.done = (
            builder,
            seed,
            start,
            tokens,
            done,
        )
        self.shares = shares

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        torch.set_num_threads(1)
        name = f"{series('train', self.seed)}-{self.start}"
        kinds, late = list(self.shares), np.array(list(self.shares.values()))
        is_text = np.isin(kinds, _TEXTS)
        early = np.where(
            is_text,
            late * EASY_TEXT / late[is_text].sum(),
            late * (1 - EASY_TEXT) / late[~is_text].sum(),
        )
        waiting: dict[tuple[int, bool, int], list[Item]] = defaultdict(list)
        index = number
        while True:
            random, ease = random_state("item", name, index), self.done.value / _EASY
            shares = early if ease < 1 else late
            kind = kinds[random.choice(len(kinds), p=shares / shares.sum())]
            scene = _MAKERS[kind](random_state(kind, name, index))
            index += workers
            # Lists of up to 360 pairs and clips of up to 16 frames, in proportion to how far the
            # run is.
            hard = (
                len(scene.question) / 2600
                if kind == "recall"
                else len(scene.pictures) / 20
                if scene.moving
                else 0
            )
            if hard > 0.25 + ease:
                continue
            item = make_item(scene, kind, self.builder, compressed=random.rand() < 0.25, turns=True)
            length = padded_length(item)
            group = waiting[len(item.tiles), scene.moving, length]
            group.append(item)
            if len(group) * length >= self.tokens:
                each = OTHER_ANSWER if len(item.tiles) else TEXT_ANSWER
                yield collate(group, self.builder.config.image_token_id, length, each * len(group))
                group.clear()
