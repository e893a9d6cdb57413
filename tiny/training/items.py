"""Makes training items from scenes: token ids, uint8 tiles and labels of patches.

Every question that a scene has is used, as one turn of a conversation after another. With a single
answer per page, most of the tokens that the GPU processes would teach nothing.

The prompts are those of `calibrate.prompts`, which a test checks. They are built here from raw
pixels, because encoding, decoding and normalising in float32 on the CPU would keep the GPU waiting:
still pictures are not encoded at all, since PNG is lossless.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from calibrate.sources.synthetic.clips import FPS
from calibrate.sources.synthetic.drawing import mp4_bytes
from calibrate.sources.synthetic.scenes import Picture, Scene
from calibrate.tiles import tile_grid
from calibrate.video import decode
from checkpoint.config import CheckpointConfig
from checkpoint.video import UNPRUNED
from tiny.training.labels import PATCH, patch_labels

_TURN = "\n<SPECIAL_11>User\n{}\n<SPECIAL_11>Assistant\n<think></think>"


@dataclass(frozen=True)
class Item:
    """One training item.

    Attributes:
        kind: The kind of the scene, or its task.
        token_ids: Prompt, answer and end of turn; the same for every further question.
        answers: Start and end of each answer in `token_ids`, its end of turn included.
        tiles: uint8 [tiles, side, side, 3]; each frame of a clip is one tile.
        labels: uint8 [tiles, patches, patches, 3]: see `tiny.training.labels`.
    """

    kind: str
    token_ids: list[int]
    answers: list[tuple[int, int]]
    tiles: np.ndarray
    labels: np.ndarray


class PromptBuilder:
    """Builds token ids from scenes, as `calibrate.prompts.build_prompt` does from samples."""

    def __init__(self, config: CheckpointConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.video_id = config.raw["video_context_token_id"]
        self.image_start = self._ids(config.raw["img_start_token"])
        self.image_end = self._ids(config.raw["img_end_token"])
        self.end_of_answer = [*self._ids("\n"), config.text["eos_token_id"]]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def tokens(
        self, scene: Scene, tiles: list[int], turns: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of a conversation, and where its answers are.

        Args:
            scene: The scene.
            tiles: Number of tiles of each picture; not used for a clip.
            turns: Whether to include the further questions as later turns.

        Returns:
            Token ids of prompt, answer and end of turn, and the start and end of each answer.
        """
        token_ids = self._prompt(scene, tiles)
        answers: list[tuple[int, int]] = []
        self._append_answer(token_ids, answers, scene.answer)
        if turns:
            for question, answer in scene.more:
                token_ids += self._ids(_TURN.format(question))
                self._append_answer(token_ids, answers, answer)
        return token_ids, answers

    def _append_answer(
        self, token_ids: list[int], answers: list[tuple[int, int]], answer: str
    ) -> None:
        start = len(token_ids)
        token_ids += self._ids(answer)
        token_ids += self.end_of_answer
        answers.append((start, len(token_ids)))

    def _prompt(self, scene: Scene, tiles: list[int]) -> list[int]:
        """Return the token ids of the first question, with visual tokens for its placeholders."""
        conversation: list[Any] = [
            {"role": "system", "content": [{"type": "text", "text": "/no_think"}]},
            {"role": "user", "content": _content(scene)},
        ]
        rendered = self.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        token_ids = list[int]()
        tiles_of_pictures = iter(tiles)
        for token in self._ids(str(rendered)):
            if token == self.config.image_token_id:
                token_ids += self._visual_tokens(next(tiles_of_pictures))
            elif token == self.video_id:
                token_ids += self._clip_tokens(len(scene.pictures))
            else:
                token_ids.append(token)
        return token_ids

    def _visual_tokens(self, tiles: int) -> list[int]:
        tokens = [self.config.image_token_id] * (tiles * self.config.tokens_per_tile)
        return [*self.image_start, *tokens, *self.image_end]

    def _clip_tokens(self, frames: int) -> list[int]:
        token_ids = list[int]()
        for frame in range(frames):
            separator = "" if frame == 0 else "\n"
            seconds = frame * int(1000 / FPS) / 1000
            title = f"{separator}Frame {frame + 1} sampled at {seconds:.2f} seconds: "
            token_ids += self._ids(title)
            token_ids += self._visual_tokens(1)
        return token_ids


def _content(scene: Scene) -> list[dict[str, str]]:
    """Return the parts of the user's message, as `synthetic.kinds.messages` has them."""
    parts: list[dict[str, str]] = []
    if scene.moving:
        parts.append({"type": "video"})
    else:
        for number in range(1, len(scene.pictures) + 1):
            if len(scene.pictures) > 1:
                parts.append({"type": "text", "text": f"Image {number}: "})
            parts.append({"type": "image"})
    question = f"\n{scene.question}" if parts else scene.question
    parts.append({"type": "text", "text": question})
    return parts


def cut(picture: Picture, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tiles of a picture and their labels; several tiles are followed by a thumbnail.

    Args:
        picture: The picture and its marks.
        size: Pixels per side of a tile.

    Returns:
        uint8 [tiles, size, size, 3] and uint8 [tiles, patches, patches, 3].
    """
    height, width = picture.pixels.shape[:2]
    cols, rows = tile_grid(width, height, size)
    patches = size // PATCH
    pixels = _resized(picture.pixels, cols * size, rows * size)
    labels = patch_labels(picture, rows * patches, cols * patches)
    tiles = _divided(pixels, size)
    tile_labels = _divided(labels, patches)
    if len(tiles) > 1:
        thumbnail = _resized(picture.pixels, size, size)
        thumbnail_labels = patch_labels(picture, patches, patches)
        tiles = np.concatenate([tiles, thumbnail[None]])
        tile_labels = np.concatenate([tile_labels, thumbnail_labels[None]])
    return tiles, tile_labels


def _divided(image: np.ndarray, side: int) -> np.ndarray:
    """Divide [rows * side, cols * side, 3] into [rows * cols, side, side, 3]."""
    height, width, channels = image.shape
    blocks = image.reshape(height // side, side, width // side, side, channels)
    return blocks.swapaxes(1, 2).reshape(-1, side, side, channels)


def _resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return pixels
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def make_item(
    scene: Scene, kind: str, builder: PromptBuilder, compressed: bool, turns: bool = False
) -> Item:
    """Return the token ids, tiles and labels of a scene.

    Args:
        scene: The scene.
        kind: Its kind or task.
        builder: Builds the token ids.
        compressed: Whether a clip is encoded as MP4 and decoded.
        turns: Whether to include the further questions as later turns.
    """
    size = builder.config.tile_size
    patches = size // PATCH
    counts = list[int]()
    if scene.moving:
        tiles = np.stack([picture.pixels for picture in scene.pictures])
        if compressed:
            tiles = decode(mp4_bytes(tiles, FPS), "training clip", UNPRUNED).frames
        labels = np.stack([patch_labels(picture, patches, patches) for picture in scene.pictures])
    else:
        tiles = np.empty((0, size, size, 3), np.uint8)
        labels = np.empty((0, patches, patches, 3), np.uint8)
        for picture in scene.pictures:
            picture_tiles, picture_labels = cut(picture, size)
            tiles = np.concatenate([tiles, picture_tiles])
            labels = np.concatenate([labels, picture_labels])
            counts.append(len(picture_tiles))
    token_ids, answers = builder.tokens(scene, counts, turns)
    return Item(kind, token_ids, answers, tiles, labels)
