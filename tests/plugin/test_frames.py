"""The decoder: the right frames, the same ones in parallel, and what is refused."""

import io
import os
import re
import time

import av
import numpy as np
import pytest
from plugin_media import CLIPS, ODD_CLIPS, clip, picture, sound

from benchmarks.soak import empty_png
from hybridquant_vllm import conversion, frames
from hybridquant_vllm import stretches as stretches_module
from hybridquant_vllm.frames import ClipError, read_clip, sample_indices

ALL_CLIPS = CLIPS | ODD_CLIPS


def read(data, **options):
    return read_clip(data, **({"fps": 2, "max_frames": 128} | options))


def every_frame(data):
    """All frames of a clip in PyAV's own order, in RGB."""
    with av.open(io.BytesIO(data), metadata_errors="ignore") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture
def stretches(monkeypatch):
    """The numbers of stretches that clips were divided into."""
    counts = []
    divide = frames.divide

    def counting(*arguments):
        found = divide(*arguments)
        counts.append(len(found))
        return found

    monkeypatch.setattr(frames, "divide", counting)
    return counts


@pytest.mark.parametrize("name", ALL_CLIPS)
@pytest.mark.parametrize("sampling", [{}, {"fps": 0.7, "max_frames": 3}, {"fps": -1}])
def test_parallel_decoding_gives_the_frames_of_serial_decoding(name, sampling):
    data = ALL_CLIPS[name]
    parallel = read(data, **sampling)
    serial = read(data, parallel=False, **sampling)
    assert parallel.indices == serial.indices
    assert np.array_equal(parallel.frames, serial.frames)


@pytest.mark.parametrize("name", ALL_CLIPS)
def test_frames_are_those_of_their_indices(name):
    taken = read(ALL_CLIPS[name])
    every = every_frame(ALL_CLIPS[name])
    assert taken.total == len(every)
    assert list(taken.indices) == sample_indices(len(every), taken.fps, 2, 128)
    if name == "h264, rotated":
        every = [np.rot90(frame) for frame in every]
    for frame, index in zip(taken.frames, taken.indices, strict=True):
        gaps = [np.abs(frame.astype(int) - other).mean() for other in every]
        assert int(np.argmin(gaps)) == index


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h264, short groups", 3),  # three sampled frames, each in a stretch of its own
        ("h264, one group", 1),
        ("mpeg-ts", 0),
        ("raw h264", 0),
        ("gif", 0),
    ],
)
def test_only_stretches_with_sampled_frames_are_decoded(name, expected, stretches):
    fps = 1 if name == "h264, short groups" else 2
    read(ALL_CLIPS[name], fps=fps)
    assert stretches == [expected]


def test_a_stretch_that_loses_frames_makes_the_clip_be_counted(monkeypatch):
    whole = read(CLIPS["h264, short groups"])

    def lose(*arguments):
        raise stretches_module.NotParallel

    monkeypatch.setattr(stretches_module, "_decode", lose)
    counted = read(CLIPS["h264, short groups"])
    assert np.array_equal(counted.frames, whole.frames)


def test_frames_come_in_the_size_that_is_asked_for():
    small = read(CLIPS["h264, short groups"], size=(32, 48))
    assert small.frames.shape[1:] == (32, 48, 3)
    large = read(CLIPS["h264, short groups"])
    assert large.frames.shape[1:] == (64, 96, 3)


def test_no_more_frames_are_held_than_there_are_slots(monkeypatch):
    held = []

    class Counting:
        def __init__(self):
            self.now = 0

        def acquire(self):
            self.now += 1
            held.append(self.now)

        def release(self):
            self.now -= 1

    monkeypatch.setattr(conversion, "FRAME_SLOTS", Counting())
    read(CLIPS["h264, short groups"], fps=-1)
    assert len(held) == 90


REFUSED = {
    "text": (b"no video at all", "video cannot be read"),
    "empty": (b"", "video cannot be read"),
    "playlist": (b"#EXTM3U\n#EXTINF:10,\nfile:///etc/hostname\n", "video cannot be read"),
    "no index": (clip()[:900], "video cannot be read"),
    "sound": (sound(), "file has no video stream"),
    "sound with a cover": (sound(cover=True), "only a cover picture"),
    "picture": (empty_png(8, 8), "file is a picture (png)"),
    "bomb": (empty_png(100_000, 100_000), "file is a picture (png)"),
    "8K": (clip(2, 2, size=(7680, 4320), options={"preset": "ultrafast"}), "at most 16777216"),
    "ten hours": (clip(2, 1, form="matroska", options={"g": "1"}), "seconds long"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_at_once(name, monkeypatch):
    data, reason = REFUSED[name]
    if name == "ten hours":
        monkeypatch.setattr(frames, "MAX_SECONDS", 1)
    started = time.process_time()
    with pytest.raises(ClipError) as caught:
        read(data)
    assert time.process_time() - started < 1
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_larger_frames_than_the_limit_are_refused():
    with pytest.raises(ClipError, match="96x64 pixels, at most 1000 are served"):
        read(CLIPS["hevc"], max_pixels=1000)
    with pytest.raises(ClipError, match="at most 1000 pixels a frame"):
        read(CLIPS["gif"], max_pixels=1000)


def test_a_playlist_opens_no_other_file(tmp_path):
    (tmp_path / "clip.ts").write_bytes(ODD_CLIPS["mpeg-ts"])
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{tmp_path}/clip.ts\n#EXT-X-ENDLIST\n"
    with pytest.raises(ClipError, match="cannot be read"):
        read(playlist.encode())


@pytest.mark.parametrize(
    ("fps", "max_frames", "indices"),
    [(-1, -1, list(range(10))), (-1, 2, [0, 9]), (5, -1, [0, 2, 4, 6, 9]), (0.1, 5, [0])],
)
def test_either_limit_may_be_left_out_as_in_vllm(fps, max_frames, indices):
    assert sample_indices(10, 10, fps, max_frames) == indices


def test_pictures_of_the_clips_differ():
    assert not np.array_equal(picture(0, 96, 64), picture(1, 96, 64))


def test_making_clips_leaves_the_scheduling_of_the_process_alone():
    clip(4, codec="libsvtav1", options={"svtav1-params": "keyint=8"})
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize(
    ("size", "stretches", "threads"),
    [
        ((1280, 720), 1, 16),
        ((720, 1280), 5, 3),
        ((1280, 720), 13, 1),
        ((1280, 720), 72, 1),
        ((1920, 1080), 1, 16),
        ((1920, 1080), 5, 4),
        ((3840, 2160), 13, 2),
        ((3840, 2160), 72, 1),
    ],
)
def test_stretches_share_the_cores(size, stretches, threads, monkeypatch):
    """A clip with one keyframe is decoded on all cores, and twelve clips at once on one each."""
    monkeypatch.setattr(stretches_module, "worker_count", lambda: 16)
    assert stretches_module._threads_of_a_stretch(av.VideoFrame(*size), stretches) == threads


def test_stretches_of_other_clips_count_until_they_are_decoded():
    count = stretches_module.StretchCount()
    with count.added(5) as first:
        with count.added(7) as second:
            assert (first, second) == (5, 12)
        with count.added(1) as third:
            assert third == 6
    with count.added(2) as last:
        assert last == 2


def test_h264_in_avi_gives_the_frames_of_decoding_in_order():
    """Trap: AVI's time stamps are those of decoding. B-frames came out in the place of others."""
    data = clip(40, form="avi", options={"g": "8"})
    parallel = read_clip(data, fps=2, max_frames=8)
    in_order = read_clip(data, fps=2, max_frames=8, parallel=False)
    assert parallel.indices == in_order.indices
    assert np.array_equal(parallel.frames, in_order.frames)


def test_an_unknown_codec_is_named():
    data = clip(4).replace(b"avc1", b"zzz1")
    with pytest.raises(ClipError, match="a codec that FFmpeg does not know"):
        read_clip(data, fps=2, max_frames=8)


def test_opening_a_file_has_the_limit_on_the_size_of_frames(monkeypatch):
    """Trap: opening decodes the first frames, and 16,000 x 16,000 pixels took 739 MB there."""
    given = []
    opened = av.open

    def recording(*arguments, **options):
        given.append(options["options"])
        return opened(*arguments, **options)

    monkeypatch.setattr(av, "open", recording)
    with pytest.raises(ClipError, match="96x64 pixels, at most 1000"):
        read_clip(CLIPS["h264, short groups"], fps=2, max_frames=8, max_pixels=1000)
    assert given == [{"protocol_whitelist": "none", "max_pixels": "1000"}]


@pytest.mark.parametrize("parallel", [True, False])
def test_frames_before_the_damage_of_a_file_are_kept(parallel):
    """As vLLM's loader does; the seventh frame's header has a wrong length."""
    data = bytearray(clip(12, form="apng", codec="apng", pixel_format="rgb24"))
    headers = [found.start() for found in re.finditer(b"fcTL", data)]
    data[headers[6] - 4 : headers[6]] = b"\x00\x00\x00\x05"
    found = read_clip(bytes(data), fps=0, max_frames=0, parallel=parallel)
    assert found.indices == (0, 1, 2, 3, 4, 5)
