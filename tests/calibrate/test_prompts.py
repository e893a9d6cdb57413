"""Prompts: where visual tokens stand, how long they are after EVS, and what is refused."""

import struct
import zlib

import pytest
import torch
from calibrate_media import (
    clip_bytes,
    data_url,
    image_bytes,
    image_part,
    picture,
    text,
    user,
    video_part,
)

from calibrate import prompts as building
from calibrate.samples import Sample, Skipped
from calibrate.tiles import load_image
from checkpoint.faults import BadInput
from checkpoint.video import UNPRUNED

CLIP = clip_bytes(30, 10)


def build_prompt(sample, config, tokenizer, video=UNPRUNED, **options):
    return building.build_prompt(sample, config, tokenizer, video, **options)


def build_prompts(samples, config, tokenizer, **options):
    return building.build_prompts(samples, config, tokenizer, UNPRUNED, **options)


def sample(*messages, name="s"):
    return Sample(name, list(messages), "test")


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for data in (header, b"IDAT"):
        file += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return file


def test_visual_spans_cover_every_visual_token_and_nothing_else(config, tokenizer):
    chat = user(
        text("a"),
        image_part(picture(700, 300)),
        video_part(CLIP),
        text("b"),
        image_part(picture(9, 9)),
    )
    prompt = build_prompt(sample(chat), config, tokenizer)
    covered = []
    for item in prompt.media:
        for run in item.visual:
            covered += range(run.start, run.end)
    ids = torch.tensor(prompt.token_ids)
    assert covered == (ids == config.image_token_id).nonzero().flatten().tolist()
    assert [(item.kind, item.first_tile, item.tiles) for item in prompt.media] == [
        ("image", 0, 11),
        ("video", 11, 6),
        ("image", 17, 1),
    ]
    assert prompt.tiles.shape == (18, 3, config.tile_size, config.tile_size)


def test_media_span_holds_its_own_tokens(config, tokenizer):
    prompt = build_prompt(sample(user(text("a"), video_part(CLIP), text("b"))), config, tokenizer)
    (item,) = prompt.media
    shown = tokenizer.decode(prompt.token_ids[item.span.start : item.span.end])
    shown = shown.replace(config.raw["img_context_token"], "")
    assert shown.startswith(
        "Frame 1 sampled at 0.00 seconds: <img></img>\nFrame 2 sampled at 0.50 seconds: <img>"
    )
    assert shown.endswith("Frame 6 sampled at 2.90 seconds: <img></img>")


def test_sample_that_ends_with_the_assistant_gets_no_generation_prompt(config, tokenizer):
    chat = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]
    shown = tokenizer.decode(build_prompt(sample(*chat), config, tokenizer).token_ids)
    assert shown.rstrip().endswith("This.\n<SPECIAL_12>")


def test_generation_prompt_can_be_left_out(config, tokenizer):
    chat = sample({"role": "user", "content": "Which?"})
    closed = build_prompt(chat, config, tokenizer, add_generation_prompt=False).token_ids
    opened = build_prompt(chat, config, tokenizer).token_ids
    assert opened[: len(closed)] == closed
    assert len(opened) > len(closed)


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.75, 0.9, 0.99])
def test_length_counts_what_evs_leaves(rate, config, tokenizer):
    chat = sample(user(image_part(picture(9, 9)), video_part(CLIP)))
    prompt = build_prompt(chat, config, tokenizer, UNPRUNED.with_rate(rate))
    each = config.tokens_per_tile
    left = max(each, int(6 * each * (1 - rate)))
    assert prompt.length == len(prompt.token_ids) - 6 * each + left


def broken_png():
    return image_bytes(picture(60, 60))[:500]


BAD = {
    "<image> in text": (
        user(text("where is <image> here"), image_part(picture(4, 4))),
        "text contains the placeholder <image>",
    ),
    "<image> in plain text": (
        {"role": "user", "content": "<image>"},
        "text contains the placeholder <image>",
    ),
    "<video> in text": (user(text("<video>")), "text contains the placeholder <video>"),
    "image missing": (
        user({"type": "image_url", "image_url": {"url": "/nowhere/a.png"}}),
        "cannot be read: No such",
    ),
    "image is text": (
        user({"type": "image_url", "image_url": {"url": data_url(b"hello", "image/png")}}),
        "image cannot",
    ),
    "image cut off": (
        user({"type": "image_url", "image_url": {"url": data_url(broken_png(), "image/png")}}),
        "image cannot",
    ),
    "image too large": (
        user(
            {
                "type": "image_url",
                "image_url": {"url": data_url(png_header(20_000, 20_000), "image/png")},
            }
        ),
        "at most 178956970 pixels are served",
    ),
    "image without width": (
        user({"type": "image_url", "image_url": {"url": data_url(png_header(0, 5), "image/png")}}),
        "image",
    ),
    "postscript": (
        user(
            {
                "type": "image_url",
                "image_url": {"url": data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n", "image/eps")},
            }
        ),
        "image cannot be read",
    ),
    "video is an mp4 cut off": (user(video_part(CLIP[:400])), "video cannot be read"),
    "remote": (
        user({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}),
        "nothing is downloaded",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sample_is_a_fault_that_names_it(name, config, tokenizer):
    message, what = BAD[name]
    with pytest.raises(BadInput) as caught:
        build_prompt(sample(message, name="s7"), config, tokenizer)
    assert what in str(caught.value)
    assert "test: sample s7" in str(caught.value)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_picture_of_more_than_eight_bits_is_a_fault(mode, config, tokenizer):
    chat = user(image_part(picture(8, 8, "L").convert("I").convert(mode), "TIFF"))
    with pytest.raises(BadInput, match="more than 8 bits"):
        build_prompt(sample(chat), config, tokenizer)


def test_whatever_a_sample_raises_is_skipped_and_memory_is_not(config, tokenizer, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(building, "load_image", broken)
    samples = [sample(user(image_part(picture(4, 4))), name="0"), sample(user(text("x")), name="1")]
    skipped = Skipped(limit=1)
    (prompt,) = build_prompts(samples, config, tokenizer, skipped=skipped)
    assert prompt.sample_id == "test: sample 1"
    assert "test: sample 0: cannot be used: ZeroDivisionError: surprise" in str(skipped.faults[0])

    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr(building, "load_image", exhausted)
    with pytest.raises(MemoryError):
        list(build_prompts(samples, config, tokenizer, skipped=Skipped(limit=9)))


def test_a_template_may_put_media_in_another_order(config, tokenizer, monkeypatch):
    """vLLM gives the n-th image placeholder the n-th image, whatever stands between."""
    monkeypatch.setattr(tokenizer, "chat_template", "<image> then <video>")
    chat = sample(user(video_part(CLIP), image_part(picture(4, 4))))
    prompt = build_prompt(chat, config, tokenizer)
    assert [(item.kind, item.tiles) for item in prompt.media] == [("image", 1), ("video", 6)]


CALL = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"a": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "clock"}}]
WITH_TOOLS = [
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "content": "", "reasoning": "A tool knows.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "12:00"},
]


def test_tools_and_reasoning_reach_a_template_that_knows_them(config, tokenizer, monkeypatch):
    template = (
        "{{ tools | tojson }}{% for m in messages %}{% if m.role == 'tool' %}[{{ m.content }}]"
        "{% elif m.tool_calls %}{{ m.reasoning_content }}{{ m.tool_calls[0].function.arguments.a }}"
        "{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    chat = Sample("s", WITH_TOOLS, "test", tools=TOOLS)
    shown = tokenizer.decode(build_prompt(chat, config, tokenizer).token_ids)
    assert "clock" in shown
    assert shown.endswith("A tool knows.1[12:00]")


@pytest.mark.parametrize("count", [2, 3])
def test_tools_that_the_template_ignores_are_a_fault(count, config, tokenizer):
    with pytest.raises(BadInput, match="the chat template ignores"):
        build_prompt(sample(*WITH_TOOLS[:count]), config, tokenizer)


def test_prompt_longer_than_the_limit_is_a_fault(config, tokenizer):
    with pytest.raises(BadInput, match="at most 60 fit"):
        build_prompt(sample(user(image_part(picture(9, 9)))), config, tokenizer, max_length=60)


def test_length_is_counted_after_pruning(config, tokenizer):
    chat = sample(user(video_part(CLIP)))
    with pytest.raises(BadInput, match="at most 240 fit"):
        build_prompt(chat, config, tokenizer, max_length=240)
    video = UNPRUNED.with_rate(0.75)
    assert build_prompt(chat, config, tokenizer, video, max_length=240).length <= 240


def test_template_that_refuses_is_a_fault(config, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadInput, match="roles must alternate"):
        build_prompt(sample({"role": "user", "content": "x"}), config, tokenizer)


def test_template_that_drops_an_image_is_a_fault(config, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].role }}")
    with pytest.raises(BadInput, match="renders media \\[\\], expected \\['image'\\]"):
        build_prompt(sample(user(image_part(picture(4, 4)))), config, tokenizer)


def test_skipped_samples_do_not_count(config, tokenizer):
    samples = [sample(user(text("<image>")), name="0")]
    for name in "123":
        samples.append(sample({"role": "user", "content": "x"}, name=name))
    skipped = Skipped(limit=1)
    prompts = list(build_prompts(samples, config, tokenizer, count=2, skipped=skipped))
    assert [prompt.sample_id for prompt in prompts] == ["test: sample 1", "test: sample 2"]
    assert skipped.samples == 1


def test_too_many_bad_samples_end_with_every_name_and_reason(config, tokenizer):
    samples = [sample(user(text("<image>")), name=str(number)) for number in range(5)]
    with pytest.raises(BadInput) as caught:
        list(build_prompts(samples, config, tokenizer, skipped=Skipped(limit=2)))
    for number in range(3):
        assert f"sample {number}: text contains the placeholder" in str(caught.value)
    for number in range(3, 5):
        assert f"sample {number}" not in str(caught.value)


def test_nothing_to_build_is_a_fault(config, tokenizer):
    with pytest.raises(BadInput, match="no sample can be used"):
        list(build_prompts([], config, tokenizer))


def test_transparency_is_laid_on_white():
    image = picture(4, 4).convert("RGBA")
    image.putalpha(0)
    assert load_image(image_bytes(image), "x").getpixel((0, 0)) == (255, 255, 255)


def test_text_prompt_has_no_tiles(config, tokenizer):
    prompt = build_prompt(sample({"role": "user", "content": "x"}), config, tokenizer)
    assert prompt.tiles.shape == (0, 3, config.tile_size, config.tile_size)
    assert prompt.tiles.dtype == torch.float32
    assert prompt.media == ()
