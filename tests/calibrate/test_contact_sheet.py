"""The contact sheet of a clip: what EVS keeps of each frame, drawn and counted."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import calibrate
from calibrate.contact_sheet import dimmed, draw_sheet, prune_clip
from calibrate.evs import retained_tokens
from checkpoint.faults import BadInput
from checkpoint.video import Video
from serve.demo import draw_video

ROOMS = Path(calibrate.__file__).parents[1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Eight seconds: a disc moves, and a box is there for a second and a half."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    draw_video(path)
    return path


@pytest.fixture(scope="module")
def kept(clip, tiny_checkpoint):
    return prune_clip(clip.read_bytes(), "clip.mp4", tiny_checkpoint, Video())


def run(*arguments):
    command = [sys.executable, "-m", "calibrate.evs", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOMS)


def test_the_patches_kept_are_those_of_evs(kept, tiny_config):
    assert len(kept.frames) == 16
    assert sum(kept.counts) == retained_tokens(16, tiny_config.tokens_per_tile, 0.75)
    assert kept.counts[0] == tiny_config.tokens_per_tile  # the first frame is kept whole
    assert min(kept.counts[1:]) < max(kept.counts[1:])
    assert kept.seconds[:3] == (0.0, 0.5, 1.0)


def test_the_budget_is_that_of_a_prompt(kept):
    dropped = kept.mask.size - sum(kept.counts)
    assert kept.unpruned_tokens - kept.prompt_tokens == dropped
    assert kept.budget().startswith(f"{sum(kept.counts)} of 1,024 visual tokens kept; prompt")


def test_dropped_patches_lose_their_colour_and_kept_ones_stay():
    frame = np.full((8, 8, 3), (200, 40, 90), np.uint8)
    shown = dimmed(frame, np.array([[True, False], [False, True]]))
    assert (shown[:4, :4] == frame[:4, :4]).all()
    assert (shown[4:, 4:] == frame[4:, 4:]).all()
    dropped = shown[:4, 4:]
    assert (dropped == dropped[0, 0, 0]).all()
    assert dropped[0, 0, 0] < frame.mean()


def test_each_frame_has_its_place_on_the_sheet(kept):
    sheet = np.asarray(draw_sheet(kept, columns=8))
    one_row = np.asarray(draw_sheet(kept, columns=16))
    assert sheet.shape[1] * 2 == pytest.approx(one_row.shape[1], abs=20)
    assert sheet.shape[0] > one_row.shape[0]


def test_the_command_writes_a_png(clip, tiny, tmp_path):
    out = tmp_path / "sheet.png"
    done = run(clip, "--model", tiny, "--rate", 0.9, "--fps", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: 8 frames, 64 of 512 visual tokens kept")
    assert "only the first frame survives" in done.stderr
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width > image.height


def test_a_sheet_that_no_program_would_open_is_refused_before_the_tower_runs(
    clip, tiny_checkpoint, monkeypatch
):
    monkeypatch.setattr("calibrate.contact_sheet._MOST_PIXELS", 10_000)
    monkeypatch.delattr("calibrate.contact_sheet.load_model")
    with pytest.raises(BadInput, match="a sheet of 16 frames would have"):
        prune_clip(clip.read_bytes(), "clip.mp4", tiny_checkpoint, Video())


def test_a_png_that_cannot_be_written_is_refused_first(clip, tmp_path):
    (tmp_path / "sheet.png").mkdir()
    done = run(clip, "--model", tmp_path, "--out", tmp_path / "sheet.png")
    assert done.returncode == 2
    assert "sheet.png: is a directory" in done.stderr


def test_all_that_is_wrong_is_named_at_once(tmp_path):
    done = run(tmp_path / "none.mp4", "--model", tmp_path, "--rate", 1, "--out", "sheet.jpg")
    assert done.returncode == 2
    assert [line.rpartition(": ")[0] for line in done.stderr.splitlines()] == [
        f"error: {tmp_path / 'none.mp4'}",
        "error: --rate",
        "error: sheet.jpg",
    ]
