"""Prompts, tiles, sampled frames and EVS masks against vLLM's own, in its own environment."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from calibrate_media import clip_bytes, image_part, picture, text, trimmed, user, video_part
from vllm_process import without_python

from calibrate.evs import retained_tokens, retention_mask
from calibrate.prompts import build_prompt
from calibrate.samples import Sample
from calibrate.tiles import frame_tiles, tile_grid
from calibrate.video import decode
from checkpoint.video import UNPRUNED, Video
from serve.command import build_command
from serve.environment import Device
from serve.settings import ServeSettings

REFERENCE = Path(__file__).with_name("vllm_reference.py")
# As in vllm_reference.py.
TILED = 4
EVERY = 37

FEW_FRAMES = Video(pruning_rate=0, fps=0.7, max_frames=9)
"""Another sampling than the default, for the indices."""

SYSTEM = {"role": "system", "content": "Answer shortly. /no_think"}
ASSISTANT = {"role": "assistant", "content": "A red line."}


def _exif(image):
    exif = image.getexif()
    exif[0x0112] = 6
    return image_part(image, "JPEG", quality=95, exif=exif.tobytes())


def _palette():
    image = picture(90, 60).quantize(16)
    image.info["transparency"] = 3
    return image_part(image, transparency=3)


def _clip(frames, fps, **options):
    return video_part(clip_bytes(frames, fps, **options))


CHATS = {
    "text": [user(text("What is it?"))],
    "plain string": [{"role": "user", "content": "Read the table. 日本語 ñ 🙂"}],
    "no_think": [SYSTEM, user(text("What is it?"))],
    "think": [{"role": "system", "content": "/think"}, user(text("Count them."))],
    "no_think in user": [user(text("Count them. /no_think"))],
    "turns": [SYSTEM, user(text("Which?")), ASSISTANT, user(text("Why?"))],
    "ends with assistant": [user(image_part(picture(40, 30)), text("Which?")), ASSISTANT],
    "square": [user(image_part(picture(512, 512)), text("What is it?"))],
    "portrait": [SYSTEM, user(image_part(picture(300, 900)), text("What is it?"))],
    "one pixel": [user(image_part(picture(1, 1)), text("What is it?"))],
    "panorama": [user(text("Before. "), image_part(picture(1500, 60)), text("After."))],
    "tower": [user(image_part(picture(37, 900)), text("What is it?"))],
    "odd size": [user(image_part(picture(641, 479)), text("What is it?"))],
    "three images": [
        user(
            image_part(picture(100, 100)),
            text("and"),
            image_part(picture(700, 300)),
            image_part(picture(9, 30)),
        )
    ],
    "images in two turns": [
        user(image_part(picture(50, 50)), text("A?")),
        ASSISTANT,
        user(text("B?"), image_part(picture(60, 20))),
    ],
    "grayscale": [user(image_part(picture(80, 50, "L")))],
    "alpha": [user(image_part(picture(80, 50, "RGBA")))],
    "gray and alpha": [user(image_part(picture(80, 50, "LA")))],
    "palette": [user(_palette())],
    "bilevel": [user(image_part(picture(80, 50, "1")))],
    "cmyk": [user(image_part(picture(80, 50, "CMYK"), "JPEG"))],
    "exif": [user(_exif(picture(80, 50)))],
    "webp": [user(image_part(picture(81, 50), "WEBP"))],
    # Not a file of one frame: OpenCV 5 loses it, and the server refuses the clip.
    "one frame of ten": [user(_clip(10, 30), text("What happened?"))],
    "two frames": [user(_clip(2, 1), text("What happened?"))],
    "ntsc": [user(_clip(100, "30000/1001"), text("What happened?"))],
    "film": [user(_clip(70, "24000/1001"), text("What happened?"))],
    "7 fps": [user(_clip(40, 7), text("What happened?"))],
    "12.5 fps": [user(_clip(50, "25/2"), text("What happened?"))],
    "130 frames": [user(_clip(130, 2), text("What happened?"))],
    "image and video": [SYSTEM, user(image_part(picture(70, 30)), _clip(9, 3), text("Same?"))],
    "video, image, video": [
        user(_clip(20, 10), text("x"), image_part(picture(20, 30)), _clip(5, 1, width=32))
    ],
    "webm": [user(video_part(clip_bytes(30, 10, form="webm", codec="libvpx-vp9"), "video/webm"))],
    "gif": [user(video_part(clip_bytes(12, 4, form="gif", codec="gif"), "video/gif"))],
}

CLIPS = {
    "h264": clip_bytes(90, 30, codec="libx264"),
    "odd height": clip_bytes(20, 10, width=98, height=54),
    "portrait": clip_bytes(20, 5, width=48, height=96),
    "turned 90": clip_bytes(12, 4, rotation=90),
    "turned 180": clip_bytes(12, 4, rotation=180),
    "turned -90": clip_bytes(12, 4, rotation=-90),
    "webm": clip_bytes(31, 10, form="webm", codec="libvpx-vp9"),
    "gif": clip_bytes(12, 4, form="gif", codec="gif"),
    "mkv": clip_bytes(33, 10, form="matroska"),
    "avi": clip_bytes(33, 10, form="avi"),
    "mpeg-ts": clip_bytes(40, 10, form="mpegts"),
    "trimmed": trimmed(clip_bytes(60, 10, codec="libx264"), 17),
    "trimmed by one": trimmed(clip_bytes(40, 10), 1),
    "variable rate": clip_bytes(40, 30, codec="libx264", slow_from=20),
    "100 s": clip_bytes(700, 7),
    "63.5 s": clip_bytes(127, 2),
    "64.5 s": clip_bytes(129, 2),
}

_RANDOM = np.random.RandomState(5)
_SIDES = np.exp(_RANDOM.uniform(0, 9, (1500, 2))).astype(int).clip(1)
GRID_IMAGES = [(int(width), int(height)) for width, height in _SIDES]
for _columns in range(1, 13):
    for _rows in range(1, 13):
        GRID_IMAGES.append((512 * _columns, 512 * _rows))
GRID_TILES = (128, 512)


def _evs_inputs():
    """Embeddings by `dtype/kind/frames/rows/cols/rate`."""
    random = np.random.RandomState(7)
    inputs = {}
    for frames, rows, cols in ((1, 4, 4), (2, 4, 4), (7, 4, 4), (12, 16, 16)):
        shape = (frames, rows * cols, 24)
        still = np.repeat(random.standard_normal((1, *shape[1:])), frames, axis=0)
        kinds = {
            "random": random.standard_normal(shape),
            "near-static": still + 0.003 * random.standard_normal(shape),
            "all-tie": still,
            "zero": np.zeros(shape),
        }
        for kind, values in kinds.items():
            flat = values.reshape(frames * rows * cols, 24).astype(np.float32)
            for dtype in ("bfloat16", "float32"):
                for rate in (0.1, 0.5, 0.7, 0.75, 0.9, 0.99):
                    inputs[f"{dtype}/{kind}/{frames}/{rows}/{cols}/{rate}"] = flat
    return inputs


EVS = _evs_inputs()


def media_io_kwargs(directory, video):
    """What `python -m serve` gives to vLLM's loader of videos."""
    settings = ServeSettings(video=video)
    command = build_command(directory, settings, (0, 32, 0), Device("cpu"))
    return json.loads(command[command.index("--media-io-kwargs") + 1])["video"]


@pytest.fixture(scope="session")
def reference(vllm_process, config, tmp_path_factory):
    at = tmp_path_factory.mktemp("vllm")
    paths = {}
    for name, data in CLIPS.items():
        paths[name] = str(at / name)
        Path(paths[name]).write_bytes(data)
    chats = {}
    for name, messages in CHATS.items():
        open_turn = messages[-1]["role"] != "assistant"
        chats[name] = {"messages": messages, "open_turn": open_turn}
    cases = {
        "chats": chats,
        "clips": paths,
        "media_io_kwargs": media_io_kwargs(config.directory, UNPRUNED),
        "few_frames": media_io_kwargs(config.directory, FEW_FRAMES),
        "grid_images": GRID_IMAGES,
        "grid_tiles": GRID_TILES,
    }
    (at / "cases.json").write_text(json.dumps(cases))
    np.savez(at / "evs.npz", **EVS)
    arguments = [config.directory, at / "cases.json", at / "evs.npz", at / "out.npz"]
    environment = without_python()
    environment["HYBRIDQUANT_FAST_VIDEO"] = "0"  # vLLM's own way
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = vllm_process.run(REFERENCE, *arguments, environment=environment, directory=at)
    assert done.returncode == 0, f"vLLM's own side failed:\n{done.stderr[-4000:]}"
    return np.load(at / "out.npz")


@pytest.fixture(scope="module")
def prompts(config, tokenizer):
    """Each chat's prompt, built once for the tests of tokens and of tiles."""
    held = {}

    def build(name):
        if name not in held:
            sample = Sample(name, CHATS[name], "test")
            held[name] = build_prompt(sample, config, tokenizer, UNPRUNED)
        return held[name]

    return build


@pytest.mark.parametrize("name", CHATS)
def test_prompt_tokens_equal_vllm(name, reference, prompts):
    assert prompts(name).token_ids == reference[f"ids/{name}"].tolist()


def assert_within_rounding(tiles, expected, config, hard_edges=False):
    """Compare tiles that were resized in uint8 with vLLM's, in steps of 8 bits.

    vLLM resizes in float32 and does not clamp where the filter overshoots; ours are whole steps.
    """
    mean = torch.tensor(config.raw["norm_mean"])
    deviation = torch.tensor(config.raw["norm_std"])
    pixels = torch.tensor([3, config.tile_size, config.tile_size]).prod()
    channels = torch.arange(3).repeat_interleave(pixels // 3)[::EVERY]
    ours = (tiles * deviation[channels] + mean[channels]) * 255
    theirs = (expected * deviation[channels] + mean[channels]) * 255
    distance = (ours - theirs.clamp(0, 255)).abs()
    # Pillow's filter clamps after each of its two passes, which noise of hard edges shows.
    assert distance.mean() < (3 if hard_edges else 0.5)
    assert hard_edges or distance.max() < 9


@pytest.mark.parametrize("name", [name for name, chat in CHATS.items() if "image_url" in str(chat)])
def test_image_tiles_equal_vllm_up_to_rounding(name, reference, prompts, config):
    prompt = prompts(name)
    images = [item for item in prompt.media if item.kind == "image"]
    for number, item in enumerate(images):
        expected = torch.from_numpy(reference[f"tiles/{name}/image/{number}"])
        tiles = prompt.tiles[item.first_tile : item.first_tile + item.tiles].flatten(1)[:, ::EVERY]
        assert_within_rounding(tiles, expected, config, name in ("bilevel", "palette"))


@pytest.mark.parametrize("name", CLIPS)
def test_sampled_frames_equal_vllm(name, reference):
    clip = decode(CLIPS[name], name, UNPRUNED)
    assert list(clip.indices) == reference[f"indices/{name}"].tolist()
    assert clip.fps == pytest.approx(float(reference[f"fps/{name}"]), rel=1e-9)


@pytest.mark.parametrize("name", CLIPS)
def test_frames_of_another_sampling_equal_vllm(name, reference):
    clip = decode(CLIPS[name], name, FEW_FRAMES)
    assert list(clip.indices) == reference[f"few_indices/{name}"].tolist()


@pytest.mark.parametrize("name", CLIPS)
def test_decoded_frames_close_to_vllm(name, reference):
    frames = decode(CLIPS[name], name, UNPRUNED).frames
    expected = reference[f"frames/{name}"]
    assert frames.shape == expected.shape
    # Equal with the two FFmpeg builds at hand; others may round chroma by a grey level or two.
    assert np.abs(frames.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("name", CLIPS)
def test_frame_tiles_equal_vllm_up_to_rounding(name, reference, config):
    tiles = frame_tiles(reference[f"frames/{name}"][:TILED], config).flatten(1)[:, ::EVERY]
    expected = torch.from_numpy(reference[f"frame_tiles/{name}"])
    assert_within_rounding(tiles, expected, config)


@pytest.mark.parametrize("size", GRID_TILES)
def test_tile_grids_equal_vllm(size, reference):
    grids = [list(tile_grid(*image, size)) for image in GRID_IMAGES]
    assert grids == reference[f"grids/{size}"].tolist()


@pytest.mark.parametrize("kind", ["random", "near-static", "all-tie", "zero"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_retention_masks_equal_vllm(dtype, kind, reference):
    for name, values in EVS.items():
        if name.startswith(f"{dtype}/{kind}/"):
            *_, frames, rows, cols, rate = name.split("/")
            embeddings = torch.from_numpy(values).to(getattr(torch, dtype))
            mask = retention_mask(embeddings, int(frames), int(rows), int(cols), float(rate))
            assert mask.tolist() == reference[f"mask/{name}"].tolist(), name


def test_retained_counts_equal_vllm(reference):
    for name in EVS:
        *_, frames, rows, cols, rate = name.split("/")
        count = retained_tokens(int(frames), int(rows) * int(cols), float(rate))
        assert count == int(reference[f"retained/{name}"]), name
