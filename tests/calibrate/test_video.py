"""Frames of a clip: which are taken, that they are the right ones, and what is not a clip."""

import io

import av
import numpy as np
import pytest
from calibrate_media import clip_bytes, image_bytes, picture, trimmed

from calibrate.video import decode
from checkpoint.faults import BadInput
from checkpoint.video import UNPRUNED, Video
from hybridquant_vllm.frames import sample_indices


@pytest.mark.parametrize(
    ("total", "fps", "count", "first_and_last"),
    [
        (1, 30, 1, (0, 0)),
        (10, 30, 1, (0, 0)),  # a third of a second
        (30, 30, 2, (0, 29)),
        (45, 10, 9, (0, 44)),
        (127, 2, 127, (0, 126)),
        (128, 2, 128, (0, 127)),
        (130, 2, 128, (0, 129)),
        (1920, 30, 128, (0, 1919)),
        (9000, 30, 128, (0, 8999)),
        (100, 0, 1, (0, 0)),  # rate unknown
    ],
)
def test_two_frames_a_second_and_at_most_128(total, fps, count, first_and_last):
    indices = sample_indices(total, fps, Video().fps, Video().max_frames)
    assert len(indices) == count
    assert (indices[0], indices[-1]) == first_and_last
    assert indices == sorted(set(indices))


@pytest.mark.parametrize(
    ("fps", "max_frames", "indices"),
    [
        (1, 128, [0, 49, 99]),
        (0.1, 128, [0]),
        (2, 4, [0, 33, 66, 99]),
        (2, 1, [0]),
        (60, 3, [0, 49, 99]),
    ],
)
def test_another_rate_and_fewer_frames_are_taken_uniformly(fps, max_frames, indices):
    assert sample_indices(100, 30, fps, max_frames) == indices


def test_a_clip_is_sampled_as_the_video_says():
    clip = decode(clip_bytes(40, 10), "x", Video(fps=1, max_frames=3))
    assert clip.indices == (0, 19, 39)
    assert len(clip.frames) == 3


@pytest.mark.parametrize(
    ("fps", "duration"), [(30, 33), ("30000/1001", 33), (7, 142), (2, 500), (1, 1000)]
)
def test_frame_duration_is_whole_milliseconds(fps, duration):
    assert decode(clip_bytes(8, fps), "x", UNPRUNED).frame_duration_ms == duration


def test_frames_are_those_of_their_indices():
    clip = decode(clip_bytes(60, 12, codec="libx264"), "x", UNPRUNED)
    with av.open(io.BytesIO(clip_bytes(60, 12, codec="libx264"))) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    # PyAV's default scaler interpolates chroma otherwise, so close, and closer than to any other
    # frame.
    for frame, index in zip(clip.frames, clip.indices, strict=True):
        gaps = [np.abs(frame.astype(int) - other).mean() for other in every]
        assert int(np.argmin(gaps)) == index


def test_frames_hidden_by_an_edit_list_are_not_counted():
    clip = decode(trimmed(clip_bytes(60, 10, codec="libx264"), 17), "x", UNPRUNED)
    assert clip.indices[-1] == 42
    assert len(clip.indices) == 8


@pytest.mark.parametrize(
    ("rotation", "shape"), [(0, (48, 64)), (90, (64, 48)), (-90, (64, 48)), (180, (48, 64))]
)
def test_turned_clip_stands_upright(rotation, shape):
    assert decode(clip_bytes(4, 2, rotation=rotation), "x", UNPRUNED).frames.shape[1:3] == shape


def test_clip_of_one_frame_has_one_frame():
    assert decode(clip_bytes(1, 30), "x", UNPRUNED).indices == (0,)


def test_clip_cut_off_keeps_what_can_be_read():
    data = clip_bytes(40, 10, form="matroska")
    clip = decode(data[: len(data) // 2], "x", UNPRUNED)
    assert 1 <= len(clip.indices) < 8
    assert clip.indices[0] == 0


def audio_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"no video at all", "video cannot be read"),
        (clip_bytes(20, 10)[:300], "video cannot be read"),
        (audio_only(), "no video stream"),
        (image_bytes(picture(8, 8))[:40], "file is a picture (png)"),
    ],
    ids=["text", "mp4 without its index", "sound only", "cut image"],
)
def test_what_is_not_a_video_is_a_fault_that_names_the_sample(data, what):
    with pytest.raises(BadInput, match="sample 7") as caught:
        decode(data, "sample 7", UNPRUNED)
    assert what in str(caught.value)


def test_playlist_opens_no_other_file(tmp_path):
    (tmp_path / "clip.ts").write_bytes(clip_bytes(40, 10, form="mpegts"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{tmp_path}/clip.ts\n#EXT-X-ENDLIST\n"
    with pytest.raises(BadInput, match="cannot be read"):
        decode(playlist.encode(), "x", UNPRUNED)
