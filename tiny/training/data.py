"""Makes training batches for the tiny checkpoint: items of several kinds, padded and stacked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from calibrate.sources.synthetic.drawing import random_state
from calibrate.sources.synthetic.kinds import KINDS
from calibrate.sources.synthetic.lists import code_list, frequent, image_list, recall
from calibrate.sources.synthetic.scenes import Scene, SceneMaker, form
from tiny.tasks import series
from tiny.training.items import Item, PromptBuilder, make_item

# Share of the items by kind. A clip has several times the tokens of a page, so clips are a third of
# the tokens.
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
# Shares of the second stage, which adds `frequent`. A trained checkpoint learns to compare counts
# within a minute; the rest of the stage makes it more accurate.
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
_TEXT_KINDS = ("recall", "frequent", "code_list", "image_list")
_MAKERS: dict[str, SceneMaker] = KINDS | {
    "form": form,
    "recall": recall,
    "frequent": frequent,
    "code_list": code_list,
    "image_list": image_list,
}
_EASY = 0.2
"""Share of the run in which lists and clips grow to their full length."""
EASY_TEXT = 0.5
"""Share of text kinds during that time: the language model learns recall from lists while the tower
learns to read."""
_COMPRESSED = 0.25
"""Share of the clips that are encoded as MP4 and decoded, as all clips of the tests are."""

# Batches have few different shapes, because each shape needs its own CUDA graph. An item is padded
# to one of LENGTHS tokens; the constants below give the answer tokens per text or other item.
LENGTHS = (128, 224, 288, 384, 448, 512, 704, 896, 1152, 1408, 2048, 2944)
QUESTIONS = 12
"""Questions per item at most."""
TEXT_ANSWER = 96
OTHER_ANSWER = 56


class Batch(NamedTuple):
    """Items with equally many tiles. Answer tokens are padded, so batches of a kind have one shape.

    It is a named tuple because `DataLoader` pins the memory of tensors in named tuples, but not in
    dataclasses.

    Attributes:
        kinds: Kind of every question of every item.
        tokens: int64 [items, length], padded with 0.
        rows: int64 [answer tokens]: the item of each token to be predicted.
        columns: int64 [answer tokens]: its position in the item, at least 1.
        question: int64 [answer tokens]: index of its question in `kinds`; `questions` for padding.
        places: int64 [visual tokens]: their positions in the flattened `tokens`.
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
        """Number of items."""
        return len(self.tokens)

    @property
    def questions(self) -> int:
        """Number of questions there is room for."""
        return QUESTIONS * self.items

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that is moved to the device."""
        return (
            self.tokens,
            self.rows,
            self.columns,
            self.question,
            self.places,
            self.tiles,
            self.labels,
        )

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Batch:
        """Return a copy with other tensors, in the order of `tensors`."""
        tokens, rows, columns, question, places, tiles, labels = tensors
        return self._replace(
            tokens=tokens,
            rows=rows,
            columns=columns,
            question=question,
            places=places,
            tiles=tiles,
            labels=labels,
        )


def padded_length(item: Item) -> int:
    """Return the smallest of `LENGTHS` that an item fits into."""
    return min(length for length in LENGTHS if length >= len(item.token_ids))


def collate(items: list[Item], visual_id: int, length: int = 0, answer_tokens: int = 0) -> Batch:
    """Return a batch of items with equally many tiles.

    Args:
        items: At least one.
        visual_id: The token that every visual token has.
        length: Tokens to pad each item to; 0 pads to the longest item.
        answer_tokens: Answer tokens to pad the batch to; 0 adds no padding.
    """
    if length == 0:
        length = max(len(item.token_ids) for item in items)
    tokens = torch.zeros(len(items), length, dtype=torch.int64)
    kinds = list[str]()
    wanted = list[tuple[int, int, int]]()
    for row, item in enumerate(items):
        tokens[row, : len(item.token_ids)] = torch.tensor(item.token_ids)
        for start, end in item.answers:
            for column in range(start, end):
                wanted.append((row, column, len(kinds)))
            kinds.append(item.kind)
    padding = (0, 1, QUESTIONS * len(items))
    wanted += [padding] * (answer_tokens - len(wanted))
    rows, columns, question = torch.tensor(wanted).unbind(1)
    return Batch(
        kinds=kinds,
        tokens=tokens,
        rows=rows,
        columns=columns,
        question=question,
        places=(tokens.flatten() == visual_id).nonzero()[:, 0],
        tiles=torch.from_numpy(np.concatenate([item.tiles for item in items])),
        labels=torch.from_numpy(np.concatenate([item.labels for item in items])),
        moving=items[0].kind.startswith("video"),
    )


class Batches(IterableDataset[Batch]):
    """Endless batches; each worker of the loader draws other items of the training series.

    Args:
        builder: Builds the prompts.
        seed: Of the training series.
        start: Step that the run starts or resumes at. It is part of the name of the series, so a
            resumed run sees new items.
        tokens: Tokens per batch, approximately.
        done: Shared value: the share of the run that is done, which sets how long lists and clips
            may be.
        shares: Share of the items by kind.
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
        self.builder = builder
        self.seed = seed
        self.start = start
        self.tokens = tokens
        self.done = done
        self.shares = shares

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        visual_id = self.builder.config.image_token_id
        waiting: dict[tuple[int, bool, int], list[Item]] = defaultdict(list)
        for item in self._items():
            length = padded_length(item)
            has_tiles = len(item.tiles) > 0
            is_clip = item.kind.startswith("video")
            group = waiting[len(item.tiles), is_clip, length]
            group.append(item)
            if len(group) * length >= self.tokens:
                answer_tokens = OTHER_ANSWER if has_tiles else TEXT_ANSWER
                yield collate(group, visual_id, length, answer_tokens * len(group))
                group.clear()

    def _items(self) -> Iterator[Item]:
        """Yield items of this worker. Those that are too hard for this part of the run are left
        out.
        """
        worker = get_worker_info()
        index = worker.id if worker else 0
        workers = worker.num_workers if worker else 1
        name = f"{series('train', self.seed)}-{self.start}"
        kinds = list(self.shares)
        late = np.array(list(self.shares.values()))
        early = _early_shares(kinds, late)
        while True:
            random = random_state("item", name, index)
            ease = self.done.value / _EASY
            shares = early if ease < 1 else late
            kind = kinds[random.choice(len(kinds), p=shares / shares.sum())]
            scene = _MAKERS[kind](random_state(kind, name, index))
            index += workers
            if _difficulty(kind, scene) <= 0.25 + ease:
                compressed = random.rand() < _COMPRESSED
                yield make_item(scene, kind, self.builder, compressed, turns=True)


def _early_shares(kinds: list[str], shares: np.ndarray) -> np.ndarray:
    """Return the shares at the beginning of the run: text kinds are `EASY_TEXT` of the items."""
    is_text = np.isin(kinds, _TEXT_KINDS)
    text = shares * EASY_TEXT / shares[is_text].sum()
    other = shares * (1 - EASY_TEXT) / shares[~is_text].sum()
    return np.where(is_text, text, other)


def _difficulty(kind: str, scene: Scene) -> float:
    """Return how long a list or a clip is, about 1 for the longest; 0 for other kinds."""
    if kind == "recall":
        return len(scene.question) / 2600
    if scene.moving:
        return len(scene.pictures) / 20
    return 0.0
