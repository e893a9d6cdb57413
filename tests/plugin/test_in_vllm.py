"""The plug-in in vLLM: prompts and pixels equal calibration's, bad media are bad requests, and each
trap of the classes that it subclasses.

tests/calibrate/test_against_vllm.py compares the same prompts with stock vLLM's, token for token.
"""

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plugin_media import CLIPS, ODD_CLIPS, clip, picture, sound
from vllm_process import without_python

from benchmarks.soak import empty_png
from calibrate.prompts import build_prompt
from calibrate.samples import Sample
from checkpoint.video import UNPRUNED
from hybridquant_vllm import __version__
from serve.state_update import FOLDER_VARIABLE, Layer, mamba_layer
from serve.tune import write_files

REPORT = Path(__file__).with_name("plugin_report.py")
PLUGIN = Path(__file__).parents[2] / "plugin"


def png(width, height):
    buffer = io.BytesIO()
    Image.fromarray(picture(1, width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def messages(kind, *files):
    parts = []
    for data in files:
        url = f"data:{kind}/x;base64,{base64.b64encode(data).decode()}"
        parts.append({"type": f"{kind}_url", f"{kind}_url": {"url": url}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


GOOD = {name: messages("video", data) for name, data in (CLIPS | ODD_CLIPS).items()}
GOOD["two clips"] = messages("video", clip(20), clip(9, 3, size=(64, 64)))
GOOD["page"] = messages("image", png(620, 877))
GOOD["three pictures"] = messages("image", png(100, 100), png(256, 256), png(700, 300))


def jpegs(count):
    """A clip that is sent as pictures."""
    parts = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.fromarray(picture(number, 32, 32)).save(buffer, "JPEG")
        parts.append(buffer.getvalue())
    return pictures(parts)


def pictures(files):
    """The same of any files."""
    parts = [base64.b64encode(file).decode() for file in files]
    url = f"data:video/jpeg;base64,{','.join(parts)}"
    text = {"type": "text", "text": "What is it?"}
    return [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}, text]}]


BAD = {
    "truncated": (messages("video", clip()[:900]), "video cannot be read"),
    "sound": (messages("video", sound()), "no video stream"),
    "sound with a cover": (messages("video", sound(cover=True)), "only a cover picture"),
    "picture as a clip": (messages("video", png(64, 64)), "file is a picture"),
    "clip as a picture": (messages("image", clip()), "Failed to load image"),
    "bomb": (messages("image", empty_png(100_000, 100_000)), "make it smaller"),
    "bomb as a clip": (messages("video", empty_png(100_000, 100_000)), "file is a picture"),
    "bomb of pictures": (pictures([empty_png(100_000, 100_000)]), "frame 0 of the clip has too"),
    "many pictures": (pictures([empty_png(9000, 9000)] * 5), "are too large for one clip"),
    "pictures of two sizes": (pictures([png(64, 64), png(64, 32)]), "have 2 sizes, not one"),
    "pictures that are none": (pictures([b"abc", png(64, 64)]), "frame 0 of the clip is no"),
}


NUMBERS = [0, -2, -1.5, 1.5, math.nan, math.inf, -math.inf, 10**400, True, "8", None, [8], {}]
BAD_OPTIONS = [("num_frames", value) for value in [*NUMBERS, 129, 10**8, 8.0]]
BAD_OPTIONS += [("fps", value) for value in [*NUMBERS, 1e9, 1e300, 1e-300] if value != 1.5]
BAD_OPTIONS += [("video_backend", value) for value in ["nothing", 3, ["opencv"]]]
BAD_OPTIONS += [("frames_indices", value) for value in [3, [0, 1, 10**30], [0, 1, -1], ["a"] * 3]]
BAD_OPTIONS += [("total_num_frames", value) for value in [0, -1, 10**30, "3", math.nan]]
BAD_OPTIONS += [("duration", value) for value in [-1, math.nan, math.inf, "3"]]
"""What a request may not say about its clips, by option: 400 for a file and for pictures."""

LONG = messages("video", clip(200, 30, options={"g": "30"}))
GOOD_OPTIONS = {
    "any number": (LONG, {"num_frames": -1}, 128),
    "any number and rate": (LONG, {"num_frames": -1, "fps": -1}, 128),
    "most": (LONG, {"num_frames": 128}, 128),
    "few": (LONG, {"num_frames": 5}, 5),
    "rate": (LONG, {"fps": 3}, 20),
    "any rate": (LONG, {"fps": -1}, 32),
    "high rate": (LONG, {"fps": 1000}, 32),
    "low rate": (LONG, {"fps": 0.0001}, 1),
    "pictures": (jpegs(130), {"num_frames": -1, "fps": -1}, 128),
    "pictures of a low rate": (jpegs(3), {"num_frames": -1, "fps": 0.0001}, 3),
    "pictures of a high rate": (jpegs(3), {"fps": 1000}, 3),
}
"""What it may say, and the frames that it gets of a server with at most 128."""


def tuned_files(folder):
    """A folder with what `hybridquant tune` writes for the 12B's heads."""
    entries = [
        {"key": key, "chosen": {"launch": launch}}
        for key, launch in ((8192, "16x2"), (128, "4x1"), (2048, "8x4"))
    ]
    states = {"float32": {"batches": entries, "left_out": {}}}
    found = {"states": states, "triton": "3.6.0", "device_name": "NVIDIA_H100_80GB_HBM3"}
    (path,) = write_files(found, Layer(heads=128, groups=8, head_dim=80, state_size=128), folder)
    return path.parent


@pytest.fixture(scope="module")
def report(vllm_process, tiny, tmp_path_factory):
    """Everything that vLLM's side says, from one process."""
    at = tmp_path_factory.mktemp("plugin")
    cases = {name: {"messages": chat} for name, chat in GOOD.items()}
    cases |= {name: {"messages": chat} for name, (chat, _) in BAD.items()}
    first = GOOD["h264, short groups"]
    cases["again"] = {"messages": first}
    cases["other rate"] = {"messages": first, "video": {"fps": 1}}
    for name, (chat, options, _) in GOOD_OPTIONS.items():
        cases[name] = {"messages": chat, "video": options}
    for number, (option, value) in enumerate(BAD_OPTIONS):
        for kind, chat in (("file", first), ("pictures", jpegs(3))):
            cases[f"{kind} {number}"] = {"messages": chat, "video": {option: value}}
    (at / "cases.json").write_text(json.dumps(cases))
    environment = without_python() | {"PYTHONPATH": str(PLUGIN)}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"VLLM_CACHE_ROOT": str(at / "cache"), FOLDER_VARIABLE: str(tuned_files(at))}
    arguments = [tiny, at / "cases.json", at / "out.npz"]
    done = vllm_process.run(REPORT, *arguments, environment=environment, directory=at)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    found["log"] = (done.stdout + done.stderr).splitlines()
    found["pixels"] = np.load(at / "out.npz")
    return found


@pytest.mark.parametrize("name", GOOD)
def test_prompts_and_pixels_equal_those_of_calibration(name, report, tiny_checkpoint):
    config = tiny_checkpoint.config
    sample = Sample(name, GOOD[name], "test")
    prompt = build_prompt(sample, config, tiny_checkpoint.tokenizer, UNPRUNED)
    assert report["media"][name]["ids"] == prompt.token_ids
    mean = torch.tensor(config.raw["norm_mean"]).reshape(1, 3, 1, 1)
    deviation = torch.tensor(config.raw["norm_std"]).reshape(1, 3, 1, 1)
    seen = {"image": 0, "video": 0}
    for item in prompt.media:
        pixels = report["pixels"][f"{name}/{item.kind}/{seen[item.kind]}"]
        seen[item.kind] += 1
        assert pixels.dtype == np.uint8
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        tiles = prompt.tiles[item.first_tile : item.first_tile + item.tiles]
        assert torch.equal((values / 255.0 - mean) / deviation, tiles)


@pytest.mark.parametrize("name", BAD)
def test_bad_media_are_bad_requests_with_a_reason_at_once(name, report):
    answer = report["media"][name]
    assert BAD[name][1] in answer["error"]
    assert answer["status"] == 400
    assert answer["seconds"] < 1


def test_options_that_cannot_be_used_are_bad_requests_with_a_reason_at_once(report):
    for number, (option, value) in enumerate(BAD_OPTIONS):
        for kind in ("file", "pictures"):
            answer = report["media"][f"{kind} {number}"]
            assert answer.get("status") == 400, (kind, option, value)
            assert f"media_io_kwargs: {option} of video is " in answer["error"]
            assert len(answer["error"]) < 200
            assert answer["seconds"] < 0.5


@pytest.mark.parametrize("name", GOOD_OPTIONS)
def test_no_request_gets_more_frames_than_the_server_allows(name, report):
    answer = report["media"][name]
    assert "error" not in answer, answer
    # vLLM gives the pixels of equal clips once.
    equal = [
        other for other in GOOD_OPTIONS if report["media"][other]["hashes"] == answer["hashes"]
    ]
    assert len(report["pixels"][f"{equal[0]}/video/0"]) == GOOD_OPTIONS[name][2]


def test_the_cache_key_follows_the_file_and_how_it_is_sampled(report):
    first = report["media"]["h264, short groups"]["hashes"]
    assert report["media"]["again"]["hashes"] == first
    assert report["media"]["other rate"]["hashes"] != first


def test_one_line_says_what_is_replaced_and_in_which_vllm(report):
    lines = [line for line in report["log"] if "fast video replaces" in line]
    assert len(lines) == 1
    assert __version__ in lines[0]
    assert "HYBRIDQUANT_FAST_VIDEO=0" in lines[0]


def test_clips_come_through_the_loader_in_the_models_size(report, tiny_checkpoint):
    size = tiny_checkpoint.config.tile_size
    assert report["options"]["video"]["video_backend"] == f"hybridquant_{size}"
    assert report["loader"] == size


def test_normalizing_on_the_device_gives_vllms_values(report):
    assert report["model"]["normalized_equal"]
    assert report["model"]["normalized_is_contiguous"]


def test_frames_that_equal_the_one_before_are_computed_once(report):
    assert report["model"]["reused"] == {"asked": [5], "equal": True}


def test_upstream_trap_the_processor_must_be_registered_for_the_subclass(report):
    """A decorator of the base class; without ours, vLLM would resize in float32 silently."""
    assert report["model"]["stock_has_own_processor"]
    assert report["model"]["has_own_processor"]
    assert report["processor"] == "FastMultiModalProcessor"


def test_upstream_trap_tables_by_the_name_of_the_class(report):
    assert report["model"]["name"] == "NemotronH_Nano_VL_V2"
    assert report["model"]["registered"] == "hybridquant_vllm.model"
    assert report["model"]["is_multimodal"]


def test_upstream_trap_sequential_encoding_is_asked_with_hasattr(report):
    """Setting it False would do nothing; the subclass keeps it."""
    assert report["model"]["sequential"]


def test_upstream_trap_layer_scales_are_multiplied_and_never_loaded(report):
    """If this fails, `UnscaledEncoderLayer` may go, or must load them."""
    assert report["model"]["layer_scales"]
    assert not report["model"]["scales_are_loaded"]


def test_vllm_does_not_normalize_this_model_on_the_device_itself(report):
    assert not report["model"]["device_normalize"]


def test_the_overridden_methods_have_the_arguments_that_we_know(report):
    assert report["model"]["signatures"] == {
        "extract_feature": ["self", "pixel_values", "num_frames"],
        "images": ["self", "images", "max_num_tiles"],
        "video": ["self", "text", "videos"],
        "layer": ["self", "hidden_states", "mask_meta"],
    }


def test_vllm_launches_the_state_update_as_tuned_for_the_nearest_batch(report):
    # 20 requests are nearest to 16, 3 to 1.
    assert report["decode"]["launches"] == [[16, 2], [4, 1], [8, 4], [4, 1]]


def test_vllm_accepts_replayssm_for_the_subclass(report, tiny_config):
    """Its rings follow the convolution's and the Mamba state, 16 tokens long."""
    found = report["decode"]["replayssm"]
    assert found["supported"]
    layer = mamba_layer(tiny_config)
    assert found["shapes"][1:] == [
        [layer.heads, layer.head_dim, layer.state_size],
        [layer.heads, 16, layer.head_dim],
        [layer.heads, 16],
        [layer.groups, 16, layer.state_size],
    ]


def test_upstream_trap_stock_vllm_refuses_replayssm_for_this_model(report):
    """If this fails, `supports_replayssm` of the subclass may go."""
    assert not report["decode"]["stock replayssm"]


def test_vllm_takes_nvfp4_as_fp8_where_others_are_disabled_and_it_multiplies_right(report):
    found = report["decode"]["nvfp4"]
    supported = {"80": False, "89": True, "90": True, "100": False, "120": False}
    assert found["supported"] == supported
    assert found["on a CPU"] is False
    assert found["chosen"] == "OnAnyDevice"
    # Activations in FP8 are rounded by 1/16 at most, weights by 1/21; products average out.
    assert found["difference"] < 0.03
