"""Builds a sample's prompt token for token as vLLM does: the chat template, then the visual tokens.

The text comes from calibrate/conversation.py. Facts from vLLM 0.32:
vllm/transformers_utils/processors/nano_nemotron_vl.py (get_image_repl, get_video_repl).
tests/calibrate/test_against_vllm.py compares with vLLM.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from calibrate.conversation import MEDIA, VIDEO_TOKEN, Medium, render, template_messages
from calibrate.evs import retained_tokens
from calibrate.media_urls import media_bytes
from calibrate.samples import Sample, Skipped, faults_of_sample
from calibrate.tiles import frame_tiles, image_tiles, load_image
from calibrate.video import decode
from checkpoint.config import CheckpointConfig
from checkpoint.faults import BadInput, Fault
from checkpoint.video import Video


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a prompt."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """Index after the last token."""
        return self.start + self.length

    def shifted(self, by: int) -> Span:
        """Return the span `by` tokens later."""
        return Span(self.start + by, self.length)


@dataclass(frozen=True)
class Media:
    """One image or video in a prompt.

    Attributes:
        kind: `image` or `video`.
        first_tile: Index of its first tile in `Prompt.tiles`.
        tiles: Number of its tiles; for a video, of its frames.
        span: All its tokens, `<img>`, `</img>` and frame texts included.
        visual: The spans of visual tokens in it: one for an image, one per frame for a video.
    """

    kind: Medium
    first_tile: int
    tiles: int
    span: Span
    visual: tuple[Span, ...]


@dataclass(frozen=True)
class Prompt:
    """A sample as the model receives it, before EVS drops any token.

    Attributes:
        sample_id: `Sample.where`: source and id.
        token_ids: What vLLM builds with video pruning off.
        tiles: float32 [tiles, 3, size, size]: image tiles and video frames in the order of the
            prompt.
        media: The images and videos in the order of the prompt.
        video: How its clips were sampled, and the rate at which they are to be pruned.
    """

    sample_id: str
    token_ids: list[int]
    tiles: torch.Tensor
    media: tuple[Media, ...]
    video: Video

    @property
    def group(self) -> str:
        """The source of the sample, by which figures are grouped."""
        return self.sample_id.partition(": sample ")[0]

    @property
    def length(self) -> int:
        """Tokens that EVS leaves of the prompt."""
        rate = self.video.pruning_rate
        dropped = 0
        for item in self.media:
            if item.kind == "video" and rate > 0:
                per_frame = item.visual[0].length
                kept = retained_tokens(item.tiles, per_frame, rate)
                dropped += per_frame * item.tiles - kept
        return len(self.token_ids) - dropped


@dataclass(frozen=True)
class _Replacement:
    """What replaces one placeholder: its tokens, the spans of visual tokens in them, its tiles."""

    token_ids: list[int]
    visual: tuple[Span, ...]
    tiles: torch.Tensor


class _PromptParts:
    """Collects a prompt's tokens, media and tiles in their order."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.media: list[Media] = []
        self._tiles: list[torch.Tensor] = []
        self._tile_count = 0

    def add_text(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids

    def add_medium(self, kind: Medium, replacement: _Replacement) -> None:
        start = len(self.token_ids)
        count = len(replacement.tiles)
        visual = tuple(span.shifted(start) for span in replacement.visual)
        whole = Span(start, len(replacement.token_ids))
        self.media.append(Media(kind, self._tile_count, count, whole, visual))
        self.token_ids += replacement.token_ids
        self._tiles.append(replacement.tiles)
        self._tile_count += count

    def all_tiles(self, size: int) -> torch.Tensor:
        """float32 [tiles, 3, size, size]; tiles is 0 for a prompt without media."""
        if not self._tiles:
            return torch.empty(0, 3, size, size)
        return torch.cat(self._tiles)


def build_prompt(
    sample: Sample,
    config: CheckpointConfig,
    tokenizer: PreTrainedTokenizerFast,
    video: Video,
    *,
    add_generation_prompt: bool = True,
    max_length: int | None = None,
) -> Prompt:
    """Build the prompt of one sample.

    Args:
        sample: Its media are read and decoded here.
        config: The checkpoint's.
        tokenizer: The checkpoint's, with its chat template.
        video: How clips are sampled, and the EVS rate at which the length is counted.
        add_generation_prompt: Whether to open the assistant's turn; has no effect on a sample that
            ends with one.
        max_length: Most tokens after EVS; by default the model's context.

    Raises:
        BadInput: A medium cannot be read, the text itself contains a placeholder, the template
            cannot render the messages, or the prompt is too long.
    """
    with faults_of_sample(sample.where):
        return _build_prompt(sample, config, tokenizer, video, add_generation_prompt, max_length)


def _build_prompt(
    sample: Sample,
    config: CheckpointConfig,
    tokenizer: PreTrainedTokenizerFast,
    video: Video,
    add_generation_prompt: bool,
    max_length: int | None,
) -> Prompt:
    where = sample.where
    conversation, urls = template_messages(sample, config)
    text = render(conversation, sample, tokenizer, add_generation_prompt)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    placeholders: dict[Medium, list[int]] = {
        "image": [config.image_token_id],
        "video": tokenizer.encode(VIDEO_TOKEN, add_special_tokens=False),
    }
    places = _find_placeholders(token_ids, placeholders)
    _check_media([kind for kind, _ in places], [kind for kind, _ in urls], where)
    waiting = {kind: [url for of, url in urls if of == kind] for kind in MEDIA}
    parts = _PromptParts()
    done = 0
    for kind, start in places:
        parts.add_text(token_ids[done:start])
        # As in vLLM, the n-th placeholder of a kind takes the n-th medium of that kind, wherever
        # the template puts it.
        data = media_bytes(waiting[kind].pop(0), where)
        if kind == "image":
            parts.add_medium(kind, _image(data, where, config, tokenizer))
        else:
            parts.add_medium(kind, _video(data, where, config, tokenizer, video))
        done = start + len(placeholders[kind])
    parts.add_text(token_ids[done:])
    tiles = parts.all_tiles(config.tile_size)
    prompt = Prompt(where, parts.token_ids, tiles, tuple(parts.media), video)
    limit = max_length or config.max_length
    if prompt.length > limit:
        what = f"prompt has {prompt.length} tokens, at most {limit} fit"
        raise BadInput(Fault(where, what, "shorten it or raise the limit"))
    return prompt


def _check_media(found: list[Medium], expected: list[Medium], where: str) -> None:
    if sorted(found) != sorted(expected):
        what = f"chat template renders media {found}, expected {expected}"
        raise BadInput(Fault(where, what, "check the template"))


def answer_length(
    sample: Sample, config: CheckpointConfig, tokenizer: PreTrainedTokenizerFast
) -> int:
    """Number of tokens of the answer that a sample ends with; 0 if it ends with a question.

    The answer is what follows the opened turn of the assistant.
    """
    with faults_of_sample(sample.where):
        return _answer_length(sample, config, tokenizer)


def _answer_length(
    sample: Sample, config: CheckpointConfig, tokenizer: PreTrainedTokenizerFast
) -> int:
    conversation, _ = template_messages(sample, config)
    if not conversation or conversation[-1]["role"] != "assistant":
        return 0
    whole_text = render(conversation, sample, tokenizer, open_turn=True)
    whole = tokenizer.encode(whole_text, add_special_tokens=False)
    if len(conversation) == 1:  # there is no question
        return len(whole)
    question_text = render(conversation[:-1], sample, tokenizer, open_turn=True)
    question = tokenizer.encode(question_text, add_special_tokens=False)
    shared = 0
    for ours, theirs in zip(whole, question, strict=False):
        if ours != theirs:
            break
        shared += 1
    return len(whole) - shared


def build_prompts(
    samples: Iterable[Sample],
    config: CheckpointConfig,
    tokenizer: PreTrainedTokenizerFast,
    video: Video,
    *,
    count: int | None = None,
    skipped: Skipped | None = None,
    add_generation_prompt: bool = True,
    max_length: int | None = None,
    name: str = "sources",
) -> Iterator[Prompt]:
    """Yield the prompts of `samples`; those that cannot be built go to `skipped`.

    Args:
        samples: Read as far as needed.
        config: The checkpoint's.
        tokenizer: The checkpoint's.
        video: How clips are sampled and pruned.
        count: Prompts to yield at most; a skipped sample does not count.
        skipped: Takes the faults; without it, the first bad sample raises.
        add_generation_prompt: As in `build_prompt`.
        max_length: As in `build_prompt`.
        name: What faults call the samples.

    Raises:
        BadInput: `skipped` is full, or no sample could be built.
    """
    skipped = skipped if skipped is not None else Skipped()
    built = 0
    if count == 0:
        return
    for sample in samples:
        try:
            prompt = build_prompt(
                sample,
                config,
                tokenizer,
                video,
                add_generation_prompt=add_generation_prompt,
                max_length=max_length,
            )
        except BadInput as bad:
            skipped.add(*bad.faults)
            continue
        built += 1
        yield prompt
        if built == count:
            return
    if built == 0:
        what = "no sample can be used"
        raise BadInput(Fault(name, what, "see the faults below"), *skipped.faults)


def _find_placeholders(
    token_ids: list[int], placeholders: dict[Medium, list[int]]
) -> list[tuple[Medium, int]]:
    """(kind, start) of every placeholder in the rendered prompt."""
    places: list[tuple[Medium, int]] = []
    index = 0
    while index < len(token_ids):
        step = 1
        for kind in MEDIA:
            tokens = placeholders[kind]
            if token_ids[index : index + len(tokens)] == tokens:
                places.append((kind, index))
                step = len(tokens)
                break
        index += step
    return places


def _image(
    data: bytes, where: str, config: CheckpointConfig, tokenizer: PreTrainedTokenizerFast
) -> _Replacement:
    tiles = image_tiles(load_image(data, where), config)
    opening, closing = _brackets(config, tokenizer)
    count = len(tiles) * config.tokens_per_tile
    visual = [config.image_token_id] * count
    token_ids = list(itertools.chain(opening, visual, closing))
    return _Replacement(token_ids, (Span(len(opening), count),), tiles)


def _video(
    data: bytes,
    where: str,
    config: CheckpointConfig,
    tokenizer: PreTrainedTokenizerFast,
    video: Video,
) -> _Replacement:
    clip = decode(data, where, video, config.tile_size)
    opening, closing = _brackets(config, tokenizer)
    texts = []
    for number, index in enumerate(clip.indices, start=1):
        seconds = index * clip.frame_duration_ms / 1000.0
        newline = "" if number == 1 else "\n"
        texts.append(f"{newline}Frame {number} sampled at {seconds:.2f} seconds: ")
    token_ids: list[int] = []
    visual: list[Span] = []
    # Each text is tokenized by itself, so that the tokens do not depend on what EVS leaves around
    # it.
    for text_ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        token_ids += text_ids
        token_ids += opening
        visual.append(Span(len(token_ids), config.tokens_per_tile))
        token_ids += [config.image_token_id] * config.tokens_per_tile
        token_ids += closing
    return _Replacement(token_ids, tuple(visual), frame_tiles(clip.frames, config))


def _brackets(
    config: CheckpointConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[int]]:
    """Token ids of `<img>` and `</img>`."""
    opening = tokenizer.encode(config.raw["img_start_token"], add_special_tokens=False)
    closing = tokenizer.encode(config.raw["img_end_token"], add_special_tokens=False)
    return opening, closing
