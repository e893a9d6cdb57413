"""The items of a sweep: tiny's tasks, or clips of the user with answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.config import read_config
from checkpoint.faults import BadInput, Fault, raise_if_any
from checkpoint.video import Video
from serve.command import longest_sequence

if TYPE_CHECKING:
    from calibrate.samples import Sample
    from serve.settings import ServeSettings

VIDEO_TASKS = ("video_event", "video_static")
"""The tasks of `tiny.tasks` that EVS can change."""

CLIPS = "clips"
"""What the user's own items are called among the tasks."""

_SMALL = 16
"""Pixels per side of the frames that are decoded to count them."""

Items = dict[str, list["Sample"]]


@dataclass(frozen=True)
class ItemClip:
    """A clip of an item.

    Attributes:
        item: The item's name.
        frames: Frames that are sampled of it.
        place: The item's place among all items, since names may repeat.
    """

    item: str
    frames: int
    place: int = 0


def task_items(names: Sequence[str], count: int) -> Items:
    """Return the first test items of tasks.

    Raises:
        BadInput: A task is unknown, or the count is below 1.
    """
    from tiny.tasks import check_tasks, items

    check_tasks(names)
    return {name: items(name, count=count) for name in names}


def data_items(path: Path) -> Items:
    """Return the items of a file, as `calibrate.sources.jsonl` reads them.

    A line is `{"messages": […], "answer": "…"}`; without `answer`, the assistant's last turn is the
    answer. Answers count when they are exact, up to white space.

    Raises:
        BadInput: With every line that cannot be used or has no answer.
    """
    from calibrate.sources.jsonl import read_jsonl

    faults = []
    found = []
    for sample in read_jsonl(path):
        item = _with_answer(sample)
        if item.answer is None or not item.answer.strip():
            remedy = 'give "answer" as a text, or end with a message of the assistant'
            faults.append(Fault(item.where, "has no answer", remedy))
        found.append(item)
    raise_if_any(faults)
    return {CLIPS: [_with_media(item) for item in found]}


def _with_answer(sample: Sample) -> Sample:
    """An item without the assistant's turn at the end, which is its answer if it has none."""
    last = sample.messages[-1]
    if last.get("role") != "assistant":
        return sample
    content = last.get("content")
    answer = sample.answer
    if answer is None and isinstance(content, str):
        answer = content
    return replace(sample, messages=sample.messages[:-1], answer=answer)


def _with_media(sample: Sample) -> Sample:
    """An item whose media are in its messages: the server reads no files."""
    messages = []
    for message in sample.messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [_with_data(part, sample.where) for part in content]
            message = message | {"content": parts}
        messages.append(message)
    return replace(sample, messages=messages)


def _with_data(part: dict[str, Any], where: str) -> dict[str, Any]:
    from calibrate.media_urls import media_bytes
    from calibrate.sources.synthetic.drawing import data_url

    field = str(part.get("type"))
    if field not in ("image_url", "video_url"):
        return part
    url = part[field]["url"]
    if url.startswith("data:"):
        return part
    media_type = "image/png" if field == "image_url" else "video/mp4"
    content = media_bytes(url, where)
    return part | {field: {"url": data_url(media_type, content)}}


def count_frames(items: Mapping[str, Sequence[Sample]], video: Video) -> list[ItemClip]:
    """Decode every clip of the items and count the frames that are sampled of it.

    Raises:
        BadInput: With every clip that cannot be decoded.
    """
    from calibrate.media_urls import media_bytes
    from calibrate.video import decode

    faults: list[Fault] = []
    clips = []
    for place, sample in enumerate(_samples(items)):
        for url in _media_urls(sample, "video_url"):
            try:
                clip = decode(media_bytes(url, sample.where), sample.where, video, _SMALL)
            except BadInput as bad:
                faults += bad.faults
                continue
            clips.append(ItemClip(sample.id, len(clip.indices), place))
    raise_if_any(faults)
    return clips


def check_media(items: Mapping[str, Sequence[Sample]], settings: ServeSettings) -> None:
    """Check that a server takes the media of each item: their number, and its pictures.

    Clips are decoded by `count_frames`.

    Raises:
        BadInput: With every item that would be refused.
    """
    from calibrate.media_urls import media_bytes
    from calibrate.tiles import load_image

    limits = {"image": settings.max_images, "video": settings.max_videos}
    faults: list[Fault] = []
    for sample in _samples(items):
        urls = {kind: list(_media_urls(sample, f"{kind}_url")) for kind in limits}
        for kind, most in limits.items():
            count = len(urls[kind])
            if count > most:
                remedy = f"give --max-{kind}s {count}"
                faults.append(Fault(sample.where, f"has {count} {kind}s of at most {most}", remedy))
        for url in urls["image"]:
            try:
                load_image(media_bytes(url, sample.where), sample.where)
            except BadInput as bad:
                faults += bad.faults
    raise_if_any(faults)


def length_faults(
    items: Mapping[str, Sequence[Sample]],
    clips: Sequence[ItemClip],
    directory: Path,
    settings: ServeSettings,
    max_tokens: int,
) -> Iterator[Fault]:
    """Yield a fault for each item that is too long without EVS, which is always measured.

    Only texts and the frames of clips are counted, so an item near the limit may still be refused
    by the server.

    Args:
        items: By task.
        clips: From `count_frames`.
        directory: A checkpoint.
        settings: How it will be served.
        max_tokens: Most tokens of an answer.
    """
    from tokenizers import Tokenizer

    config = read_config(directory)
    longest = longest_sequence(config, settings)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    visual: Counter[int] = Counter()
    for clip in clips:
        visual[clip.place] += clip.frames * config.tokens_per_tile
    for place, sample in enumerate(_samples(items)):
        least = visual[place]
        for text in _texts(sample):
            least += len(tokenizer.encode(text, add_special_tokens=False).ids)
        if least + max_tokens > longest:
            what = (
                f"has at least {least} tokens, with the answer's {max_tokens} more than {longest}"
            )
            yield Fault(sample.where, what, "shorten it, or give another --max-model-len")


def _texts(sample: Sample) -> Iterator[str]:
    for message in sample.messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            for part in content:
                if part.get("type") == "text":
                    yield part["text"]


def still_warning(items: Mapping[str, Sequence[Sample]], clips: Sequence[ItemClip]) -> str | None:
    """Return a warning if a rate cannot change some items, which have no clip of two frames or
    more; else None.

    Raises:
        BadInput: It can change none.
    """
    total = sum(len(samples) for samples in items.values())
    changing = len({clip.place for clip in clips if clip.frames > 1})
    if not changing:
        what = "have no clip of which two frames are sampled, so a rate changes nothing"
        raise BadInput(Fault("the items", what, "give clips, and more --max-frames"))
    if changing == total:
        return None
    what = f"{total - changing} of {total} items have no clip of which two frames are sampled"
    return (
        f"{what}: their answers change with no rate, so the loss looks smaller than that of clips"
    )


def _samples(items: Mapping[str, Sequence[Sample]]) -> Iterator[Sample]:
    for samples in items.values():
        yield from samples


def _media_urls(sample: Sample, part_type: str) -> Iterator[str]:
    for message in sample.messages:
        content = message.get("content")
        if not isinstance(content, list):
            continue
        for part in content:
            if part.get("type") == part_type:
                yield part[part_type]["url"]


def short_clip_warning(clips: Sequence[ItemClip], rate: float) -> str | None:
    """Return a warning if a rate leaves only the first frame of some clips; else None.

    EVS keeps the first frame whole, and int(n · T · (1 − q)) of the n · T visual tokens of T
    frames, but at least n: with T · (1 − q) of 1 or less nothing of a later frame is left.
    """
    short = [clip for clip in clips if clip.frames > 1 and clip.frames * (1 - rate) <= 1 + 1e-9]
    if not short:
        return None
    longest = max(clip.frames for clip in short)
    found = f"of {len(short)} of {len(clips)} clips only the first frame survives"
    reason = f"they have at most {longest} sampled frames, such as {short[0].item}"
    return f"rate {rate:g}: {found}: {reason}"
