"""Clips that were decoded are kept, by content and options, within a bound."""

import numpy as np
import pytest
from plugin_media import clip

from hybridquant_vllm.clip_cache import DEFAULT_LIMIT_MB, LIMIT_VARIABLE, ClipCache, limit_bytes
from hybridquant_vllm.frames import read_clip

OPTIONS = {"fps": 2.0, "max_frames": 8, "size": (32, 32), "max_pixels": 10**7}
CLIP_BYTES = 8 * 32 * 32 * 3
FIRST, SECOND, THIRD = (clip(frames, 10) for frames in (40, 50, 60))


def test_a_clip_is_decoded_once_and_equals_what_is_decoded():
    cache = ClipCache(10 * CLIP_BYTES)
    kept = cache.read(FIRST, **OPTIONS)
    assert cache.read(bytes(bytearray(FIRST)), **OPTIONS) is kept
    fresh = read_clip(FIRST, **OPTIONS)
    assert np.array_equal(kept.frames, fresh.frames)
    assert kept.indices == fresh.indices


@pytest.mark.parametrize("changed", [{"fps": 1.0}, {"max_frames": 4}, {"size": (64, 64)}])
def test_other_options_are_another_clip(changed):
    cache = ClipCache(10**9)
    assert cache.read(FIRST, **OPTIONS) is not cache.read(FIRST, **OPTIONS | changed)


def test_the_least_recently_used_leaves_and_the_bound_holds():
    cache = ClipCache(2 * CLIP_BYTES)
    first = cache.read(FIRST, **OPTIONS)
    second = cache.read(SECOND, **OPTIONS)
    assert cache.read(FIRST, **OPTIONS) is first
    cache.read(THIRD, **OPTIONS)
    assert cache.size <= cache.limit
    assert cache.read(FIRST, **OPTIONS) is first
    assert cache.read(SECOND, **OPTIONS) is not second


def test_a_clip_larger_than_the_bound_is_not_kept():
    cache = ClipCache(CLIP_BYTES // 2)
    assert cache.read(FIRST, **OPTIONS) is not cache.read(FIRST, **OPTIONS)
    assert cache.size == 0


def test_a_bad_clip_is_refused_each_time():
    cache = ClipCache(10**9)
    for _ in range(2):
        with pytest.raises(ValueError, match="video cannot be read"):
            cache.read(FIRST[:900], **OPTIONS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("20", 20_000_000), ("", None), ("x", None), ("-5", None), ("1e3", None)],
)
def test_the_environment_sets_the_bound(monkeypatch, caplog, text, expected):
    monkeypatch.setenv(LIMIT_VARIABLE, text)
    assert limit_bytes() == (DEFAULT_LIMIT_MB * 10**6 if expected is None else expected)
    assert ("is not a whole number of MB" in caplog.text) == (expected is None and text != "")
