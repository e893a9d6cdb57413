"""Indexes of MP4 files that claim more than they hold are refused before FFmpeg opens the file."""

import io
import struct
import time

import av
import numpy as np
import pytest
from plugin_media import CLIPS, ODD_CLIPS, clip, picture

from hybridquant_vllm.frames import ClipError, read_clip
from hybridquant_vllm.mp4_index import MAX_ENTRIES, check_index

MANY = 50_000_000
CLIP = CLIPS["h264, short groups"]
FRAGMENTS = clip(options={"g": "8"}, container_options={"movflags": "frag_keyframe+empty_moov"})


def box(kind, *parts):
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def numbers(*values):
    """Version and flags of a box, and its fields."""
    return struct.pack(f">{1 + len(values)}I", 0, *values)


def with_long_size(data, kind):
    """A file in which the size of a box has 64 bits."""
    start = data.index(kind) - 4
    (size,) = struct.unpack(">I", data[start : start + 4])
    return data[:start] + struct.pack(">I4sQ", 1, kind, size + 8) + data[start + 8 :]


def film(sound=False, sizes=(0, 10), chunks=10, runs=((1, 1, 1),), edits=1):
    """An MP4 of which only the index is there."""
    handler = box(b"hdlr", numbers(0), b"soun" if sound else b"vide", bytes(12))
    table = box(
        b"stbl",
        box(b"stts", numbers(1, sizes[1], 1)),
        box(b"stsz", numbers(*sizes)),
        box(b"stsc", numbers(len(runs)), b"".join(struct.pack(">3I", *run) for run in runs)),
        box(b"stco", numbers(chunks), bytes(4 * chunks)),
    )
    edit_list = box(b"edts", box(b"elst", numbers(edits), bytes(12 * edits)))
    track = box(b"trak", edit_list, box(b"mdia", handler, box(b"minf", table)))
    return box(b"ftyp", b"isom") + box(b"moov", track)


def patched(data, kind, offset, *values):
    """A file in which a box has other fields, counted from its name."""
    place = data.index(kind) + offset
    end = place + 4 * len(values)
    return data[:place] + struct.pack(f">{len(values)}I", *values) + data[end:]


# A uniform size, a count and no table; and, in fragments, a count without a size of each frame.
BOMBS = {
    "frames of one size": patched(patched(CLIP, b"stsz", 8, 1, MANY), b"stsc", 16, MANY),
    "a fragment": patched(FRAGMENTS, b"trun", 4, 1, MANY),
    "many fragments": patched(FRAGMENTS, b"trun", 4, 1, 1_000_000) * 5,
    "sound in large chunks": film(sound=True, sizes=(2, MANY), chunks=1000, runs=[(1, 2**31, 1)]),
    "many edits": film(sizes=(0, 50_000), edits=1000),
    "frames in a table": film(sizes=(0, MANY)),
    "a size of 64 bits": with_long_size(film(sizes=(0, MANY)), b"stsz"),
    "a fragment with a size of 64 bits": with_long_size(
        patched(FRAGMENTS, b"trun", 4, 1, MANY), b"trun"
    ),
    "behind the frames": box(b"free", bytes(8)) + box(b"mdat", bytes(99)) + film(sizes=(0, MANY)),
    "to the end": film(sizes=(0, MANY)).replace(
        struct.pack(">I4s", 8, b"moov"), bytes(4) + b"moov"
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_index_out_of_proportion_is_refused_at_once(name):
    started = time.process_time()
    with pytest.raises(ClipError, match="video's index") as caught:
        read_clip(BOMBS[name], fps=2, max_frames=8)
    assert time.process_time() - started < 0.1
    assert len(str(caught.value)) < 200


def test_a_frame_has_at_least_the_bytes_that_the_index_claims():
    """Fewer frames than the limit on all entries, and still more than the file has bytes for."""
    check_index(film(sizes=(1, 100)))
    with pytest.raises(ClipError, match="claims 100000 frames of 1 bytes"):
        check_index(film(sizes=(1, 100_000)))


def test_a_file_that_shows_its_frames_again_and_again_is_refused_at_once():
    """Its edit list has the one edit of a good clip many times."""
    data = CLIP
    entry = data.index(b"elst") + 12
    more = data[entry : entry + 12] * 20_000
    for kind in (b"moov", b"trak", b"edts", b"elst"):
        start = data.index(kind) - 4
        (size,) = struct.unpack(">I", data[start : start + 4])
        data = patched(data, kind, -4, size + len(more))
    data = patched(data, b"elst", 8, 20_001)
    data = data[:entry] + more + data[entry:]
    check_index(data)
    started = time.process_time()
    with pytest.raises(ClipError, match="the same frames more than 4 times"):
        read_clip(data, fps=2, max_frames=8)
    assert time.process_time() - started < 1


def test_a_compressed_index_is_refused():
    with pytest.raises(ClipError, match="index is compressed"):
        check_index(box(b"moov", box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", bytes(99)))))


@pytest.mark.parametrize("name", CLIPS | ODD_CLIPS)
def test_good_clips_pass(name):
    check_index((CLIPS | ODD_CLIPS)[name])


def test_names_of_boxes_within_the_frames_mean_nothing():
    bomb = film(sizes=(0, MANY))
    check_index(box(b"ftyp", b"isom") + box(b"mdat", bomb) + film())
    large = struct.pack(">I4sQ", 1, b"mdat", 16 + len(bomb)) + bomb
    check_index(large + film())
    check_index(b"\x1a\x45\xdf\xa3" + bomb)  # Matroska


def test_fragments_pass():
    check_index(FRAGMENTS)
    assert read_clip(FRAGMENTS, fps=-1, max_frames=0).total == 40


def test_sound_of_more_samples_than_the_limit_passes():
    """Of PCM, FFmpeg makes one entry for 1,024 samples."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        sound = container.add_stream("pcm_u8", rate=48000, layout="mono")
        frame = av.VideoFrame.from_ndarray(picture(1, 96, 64), format="rgb24")
        container.mux(video.encode(frame.reformat(format="yuv420p")))
        container.mux(video.encode())
        samples = np.zeros((1, MAX_ENTRIES + 100_000), np.uint8)
        silence = av.AudioFrame.from_ndarray(samples, "u8", "mono")
        silence.sample_rate = 48000
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    assert read_clip(buffer.getvalue(), fps=2, max_frames=8).total == 1
