"""Damaged clips: decoding in parallel and one stretch after the other give the same frames."""

import random

import numpy as np
import pytest
from plugin_media import CLIPS, SHORT_GROUPS, clip

from hybridquant_vllm import stretches
from hybridquant_vllm.frames import ClipError, read_clip

# The index is at the end of an MP4, and at the beginning of a Matroska file.
WHOLE = {
    "mp4": (CLIPS["h264, short groups"], 48, -4000),
    "mp4, long groups": (clip(90, 30, options={"g": "30", "bf": "2"}), 48, -4000),
    "mpeg-ts": (clip(90, 30, "mpegts", options={"g": "12"}), 0, -800),
    "matroska": (clip(90, 30, "matroska", options=SHORT_GROUPS), 800, -800),
}


def damaged(name, seed):
    """A clip with up to ten places of flipped bits, zeros or noise, all within its frames."""
    data, start, end = WHOLE[name]
    chosen = random.Random(seed)
    found = bytearray(data)
    for _ in range(chosen.choice([1, 1, 3, 10])):
        place = chosen.randrange(start, len(data) + end)
        length = chosen.choice([1, 4, 30, 200])
        kind = chosen.choice(["bit", "zeros", "noise"])
        if kind == "bit":
            found[place] ^= 1 << chosen.randrange(8)
        elif kind == "zeros":
            found[place : place + length] = bytes(length)
        else:
            found[place : place + length] = chosen.randbytes(length)
    assert len(found) == len(data)
    return bytes(found)


def read(data, fps, parallel):
    """Frames, indices and time stamps of a clip, or the reason why there are none."""
    try:
        found = read_clip(data, fps=fps, max_frames=128, parallel=parallel)
    except ClipError as error:
        return str(error)
    stamps = [index * found.frame_duration_ms for index in found.indices]
    return found.frames.tobytes(), found.frames.shape, found.indices, stamps


@pytest.mark.parametrize("name", ["mp4", "mp4, long groups", "matroska"])
@pytest.mark.parametrize("fps", [2, 7, -1])
def test_parallel_decoding_of_a_damaged_clip_gives_the_frames_of_serial_decoding(name, fps):
    whole = read(WHOLE[name][0], fps, parallel=True)
    differ_from_whole = 0
    for seed in range(16):
        data = damaged(name, seed)
        in_parallel = read(data, fps, parallel=True)
        assert in_parallel == read(data, fps, parallel=False), seed
        differ_from_whole += in_parallel != whole
    assert differ_from_whole >= 4  # at 2 fps the damage often is in frames that are not taken


def test_a_damaged_mpeg_ts_file_raises_no_other_error():
    """Trap: PyAV raised IndexError for streams that damage had made up."""
    given = 0
    for seed in range(40):
        given += isinstance(read(damaged("mpeg-ts", seed), 2, parallel=True), tuple)
    assert given >= 20


def test_a_damaged_stretch_leaves_the_frames_of_the_others():
    """The damage is in one stretch of seven frames; all other sampled frames are untouched."""
    data = CLIPS["h264, short groups"]
    whole = read_clip(data, fps=-1, max_frames=0)
    middle = len(data) // 3
    found = read_clip(data[:middle] + bytes(100) + data[middle + 100 :], fps=-1, max_frames=0)
    place = dict(zip(found.indices, found.frames, strict=True))
    other = [
        index
        for index in whole.indices
        if index not in place or not np.array_equal(place[index], whole.frames[index])
    ]
    assert 1 <= len(other) <= 14
    assert max(other) - min(other) < 14


def test_only_the_damaged_stretch_is_decoded_again(monkeypatch):
    tolerant = []
    decoder = stretches._decoder

    def counting(stream, first, threads, options):
        tolerant.append(options == stretches._TOLERANT)
        return decoder(stream, first, threads, options)

    monkeypatch.setattr(stretches, "_decoder", counting)
    data = CLIPS["h264, short groups"]
    middle = len(data) // 3
    read_clip(data[:middle] + bytes(100) + data[middle + 100 :], fps=-1, max_frames=0)
    assert 1 <= sum(tolerant) <= 2
    assert tolerant.count(False) >= 12
