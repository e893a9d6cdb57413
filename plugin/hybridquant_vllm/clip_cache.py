"""Keeps the last clips decoded: the next turn of a conversation sends the same clip again.

vLLM looks for a clip in its own cache after it has been decoded. What is kept here is bounded by
HYBRIDQUANT_CLIP_CACHE_MB, 512 by default; 128 frames of 512 pixels are 100 MB.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from typing import Any

from hybridquant_vllm.frames import Clip, read_clip

_logger = logging.getLogger("vllm.hybridquant")

LIMIT_VARIABLE = "HYBRIDQUANT_CLIP_CACHE_MB"
DEFAULT_LIMIT_MB = 512

Key = tuple[bytes, tuple[tuple[str, Any], ...]]


class ClipCache:
    """Clips by content and options, the least recently used leaving first.

    Args:
        limit: Most bytes of frames that are kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._clips: OrderedDict[Key, Clip] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, data: bytes, **options: Any) -> Clip:
        """Return a clip as `hybridquant_vllm.frames.read_clip` does, decoded or kept.

        Its frames are shared: do not change them.

        Args:
            data: The file.
            options: Those of `read_clip`.

        Raises:
            ValueError: The clip cannot be used.
        """
        key = (hashlib.sha256(data).digest(), tuple(sorted(options.items())))
        with self._lock:
            kept = self._clips.get(key)
            if kept is not None:
                self._clips.move_to_end(key)
                return kept
        clip = read_clip(data, **options)
        self._keep(key, clip)
        return clip

    def _keep(self, key: Key, clip: Clip) -> None:
        size = clip.frames.nbytes
        if size > self.limit:
            return
        with self._lock:
            if key in self._clips:  # another request has decoded it meanwhile
                return
            self._clips[key] = clip
            self.size += size
            while self.size > self.limit:
                _, oldest = self._clips.popitem(last=False)
                self.size -= oldest.frames.nbytes


def limit_bytes() -> int:
    """Return the limit that the environment gives, in bytes; 0 keeps nothing."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    if text and not text.isdecimal():
        what = "is not a whole number of MB"
        _logger.warning("%s=%.40s %s: %d applies", LIMIT_VARIABLE, text, what, DEFAULT_LIMIT_MB)
        text = ""
    return int(text or DEFAULT_LIMIT_MB) * 10**6


KEPT_CLIPS = ClipCache(limit_bytes())
