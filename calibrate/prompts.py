"""Builds a sample's prompt token for token as vLLM does: chat template, then every placeholder to
its visual tokens.

Facts from vLLM 0.32: vllm/transformers_utils/processors/nano_nemotron_vl.py (get_image_repl,
get_video_repl) and vllm/renderers/hf.py. tests/calibrate/test_against_vllm.py compares with vLLM
itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerFast

from calibrate.evs import check_rate, retained_tokens
from calibrate.samples import Sample, Skipped, media_bytes
from calibrate.tiles import frame_tiles, image_tiles, load_image
from calibrate.video import decode
from checkpoint.config import CheckpointConfig
from checkpoint.faults import BadInput, Fault

VIDEO_TOKEN = "<video>"
_PLACEHOLDERS = ("image", "video")


@dataclass(frozen=True)
class Span:
    """A run of tokens in a prompt."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """Index behind the last token."""
        return self.start + self.length


@dataclass(frozen=True)
class Media:
    """One image or video in a prompt.

    Attributes:
        kind: `image` or `video`.
        first_tile: Its first tile in `Prompt.tiles`.
        tiles: How many tiles it has; for a video, frames.
        span: All its tokens, `<img>`, `</img>` and frame texts included.
        visual: The runs of visual tokens in it: one for an image, one a frame for a video.
    """

    kind: Literal["image", "video"]
    first_tile: int
    tiles: int
    span: Span
    visual: tuple[Span, ...]


@dataclass(frozen=True)
class Prompt:
    """A sample as the model sees it, before EVS drops any token.

    Attributes:
        sample_id: `Sample.where`, source and id.
        token_ids: What vLLM builds with video pruning off.
        tiles: Float32 [tiles, 3, size, size]: image tiles and video frames in the order of the
            prompt.
        media: The images and videos in the order of the prompt.
    """

    sample_id: str
    token_ids: list[int]
    tiles: torch.Tensor
    media: tuple[Media, ...]

    @property
    def group(self) -> str:
        """The source of the sample, by which figures are grouped."""
        return self.sample_id.partition(": sample ")[0]

    def served_length(self, pruning_rate: float) -> int:
        """Tokens that are left of the prompt at this video pruning rate."""
        dropped = 0
        for item in self.media:
            if item.kind == "video" and pruning_rate > 0:
                each = item.visual[0].length
                dropped += each * item.tiles - retained_tokens(item.tiles, each, pruning_rate)
        return len(self.token_ids) - dropped


@dataclass(frozen=True)
class _Replacement:
    """What stands in for one placeholder: its tokens, the runs of visual tokens in them, its tiles.
    """

    token_ids: list[int]
    visual: tuple[Span, ...]
    tiles: torch.Tensor


def build_prompt(
    sample: Sample,
    config: CheckpointConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    add_generation_prompt: bool = True,
    max_length: int | None = None,
    pruning_rate: float = 0.0,
) -> Prompt:
    """Build the prompt of one sample.

    Args:
        sample: Its media are read and decoded here.
        config: The checkpoint's.
        tokenizer: The checkpoint's, with its chat template.
        add_generation_prompt: Open the assistant's turn; has no effect on a sample that ends with
            one.
        max_length: Most tokens, by default the model's context.
        pruning_rate: The video pruning rate at which the length is counted. The prompt itself stays
            whole.

    Raises:
        BadInput: A medium cannot be read, the text holds a placeholder of its own, the template
            cannot render the messages, or the prompt is too long.
    """
    where = sample.where
    conversation, urls = _conversation(sample, config)
    text = _render(conversation, sample, tokenizer, add_generation_prompt)
    targets = {
        "image": [config.image_token_id],
        "video": tokenizer.encode(VIDEO_TOKEN, add_special_tokens=False),
    }
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    places = _places(token_ids, targets)
    if [kind for kind, _ in places] != [kind for kind, _ in urls]:
        found, expected = ([kind for kind, _ in items] for items in (places, urls))
        raise BadInput(
            Fault(
                where,
                f"chat template renders media {found}, expected {expected}",
                "check the template",
            )
        )
    built: list[int] = []
    media: list[Media] = []
    tiles: list[torch.Tensor] = []
    done = 0
    for (kind, start), (_, url) in zip(places, urls, strict=True):
        built += token_ids[done:start]
        data = media_bytes(url, where)
        replacement = (_image if kind == "image" else _video)(data, where, config, tokenizer)
        base = len(built)
        visual = tuple(Span(base + run.start, run.length) for run in replacement.visual)
        span = Span(base, len(replacement.token_ids))
        first = sum(len(part) for part in tiles)
        media.append(Media(kind, first, len(replacement.tiles), span, visual))
        tiles.append(replacement.tiles)
        built += replacement.token_ids
        done = start + len(targets[kind])
    built += token_ids[done:]
    size = config.tile_size
    prompt = Prompt(
        where, built, torch.cat(tiles) if tiles else torch.empty(0, 3, size, size), tuple(media)
    )
    limit = max_length or config.max_length
    if (length := prompt.served_length(pruning_rate)) > limit:
        raise BadInput(
            Fault(
                where,
                f"prompt has {length} tokens, at most {limit} fit",
                "shorten it or raise the limit",
            )
        )
    return prompt


def answer_length(
    sample: Sample, config: CheckpointConfig, tokenizer: PreTrainedTokenizerFast
) -> int:
    """Tokens of the answer that a sample ends with: those behind the opened assistant's turn; 0
    where it has none.
    """
    conversation, _ = _conversation(sample, config)
    if not conversation or conversation[-1]["role"] != "assistant":
        return 0
    whole = tokenizer.encode(
        _render(conversation, sample, tokenizer, True), add_special_tokens=False
    )
    if len(conversation) == 1:  # nothing is asked
        return len(whole)
    opened = tokenizer.encode(
        _render(conversation[:-1], sample, tokenizer, True), add_special_tokens=False
    )
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, opened))
    return len(whole) - sum(1 for _ in shared)


def build_prompts(
    samples: Iterable[Sample],
    config: CheckpointConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    count: int | None = None,
    skipped: Skipped | None = None,
    add_generation_prompt: bool = True,
    max_length: int | None = None,
    pruning_rate: float = 0.0,
    name: str = "sources",
) -> Iterator[Prompt]:
    """Yield the prompts of `samples`, at most `count`; those that cannot be built go to `skipped`.

    A skipped sample does not count, so `count` prompts come out as long as `samples` lasts. `name`
    is what a fault calls the samples.

    Raises:
        BadInput: `skipped` is full (without one, at the first bad sample), or no sample could be
            built.
    """
    check_rate(pruning_rate)
    skipped = skipped if skipped is not None else Skipped()
    built, iterator = 0, iter(samples)
    while count is None or built < count:
        try:
            sample = next(iterator)
        except StopIteration:
            break
        try:
            prompt = build_prompt(
                sample,
                config,
                tokenizer,
                add_generation_prompt=add_generation_prompt,
                max_length=max_length,
                pruning_rate=pruning_rate,
            )
        except BadInput as bad:
            skipped.add(*bad.faults)
            continue
        built += 1
        yield prompt
    if not built and count != 0:
        raise BadInput(Fault(name, "no sample can be used", "see the faults"), *skipped.faults)


def _conversation(
    sample: Sample, config: CheckpointConfig
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The messages as vLLM hands them to the template, and (kind, URL) of every medium in order."""
    image_token = config.raw["img_context_token"]
    conversation: list[dict[str, Any]] = []
    urls: list[tuple[str, str]] = []
    for message in sample.messages:
        content = message["content"]
        parts: list[dict[str, str]] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part["type"].removesuffix("_url")
            if kind == "text":
                for token in (image_token, VIDEO_TOKEN):
                    # The server would put the picture there, and the next one in its place, without
                    # a word.
                    if token in part["text"]:
                        remedy = "write it otherwise, and give media as parts of their own"
                        raise BadInput(
                            Fault(sample.where, f"text holds the placeholder {token}", remedy)
                        )
                parts.append({"type": "text", "text": part["text"]})
            elif kind in _PLACEHOLDERS:
                value = part[part["type"]]
                urls.append((kind, value["url"] if isinstance(value, dict) else value))
                parts.append({"type": kind})
            else:
                raise BadInput(
                    Fault(
                        sample.where,
                        f"unknown content part {part['type']!r}",
                        "text, image or video",
                    )
                )
        conversation.append({"role": message["role"], "content": parts})
    return conversation, urls


def _render(
    conversation: list[dict[str, Any]],
    sample: Sample,
    tokenizer: PreTrainedTokenizerFast,
    open_turn: bool,
) -> str:
    if not conversation:
        raise BadInput(Fault(sample.where, "messages is empty", "give at least one message"))
    open_turn = open_turn and conversation[-1]["role"] != "assistant"
    try:
        return str(
            tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=open_turn
            )
        )
    except Exception as error:  # a template raises whatever its author chose
        raise BadInput(
            Fault(sample.where, f"chat template refuses the messages: {error}", "reorder them")
        ) from None


def _places(
    token_ids: list[int], targets: dict[str, list[int]]
) -> list[tuple[Literal["image", "video"], int]]:
    """(kind, start) of every placeholder in the rendered prompt."""
    places: list[tuple[Literal["image", "video"], int]] = []
    index = 0
    while index < len(token_ids):
        for kind in _PLACEHOLDERS:
            target = targets[kind]
            if token_ids[index : index + len(target)] == target:
                places.append((kind, index))  # type: ignore[arg-type]
                index += len(target) - 1
                break
        index += 1
    return places


def _image(
    data: bytes, where: str, config: CheckpointConfig, tokenizer: PreTrainedTokenizerFast
) -> _Replacement:
    tiles = image_tiles(load_image(data, where), config)
    opening, closing = _brackets(config, tokenizer)
    count = len(tiles) * config.tokens_per_tile
    token_ids = [*opening, *[config.image_token_id] * count, *closing]
    return _Replacement(token_ids, (Span(len(opening), count),), tiles)


def _video(
    data: bytes, where: str, config: CheckpointConfig, tokenizer: PreTrainedTokenizerFast
) -> _Replacement:
    clip = decode(data, where)
    opening, closing = _brackets(config, tokenizer)
    seconds = [index * clip.frame_duration_ms / 1000.0 for index in clip.indices]
    texts = [
        ("" if number == 1 else "\n") + f"Frame {number} sampled at {second:.2f} seconds: "
        for number, second in enumerate(seconds, start=1)
    ]
    token_ids: list[int] = []
    visual: list[Span] = []
    # Each text is tokenized by itself, so that the tokens do not depend on what EVS leaves around
    # them.
    for separator in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        token_ids += [*separator, *opening]
        visual.append(Span(len(token_ids), config.tokens_per_tile))
        token_ids += [*[config.image_token_id] * config.tokens_per_tile, *closing]
    return _Replacement(token_ids, tuple(visual), frame_tiles(clip.frames, config))


def _brackets(
    config: CheckpointConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[int]]:
    opening, closing = (config.raw[key] for key in ("img_start_token", "img_end_token"))
    return tokenizer.encode(opening, add_special_tokens=False), tokenizer.encode(
        closing, add_special_tokens=False
    )
