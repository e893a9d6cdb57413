"""Lets vLLM count on a medium in the engine's cache only after the engine was given it.

vLLM's server remembers the media that it has prepared, and sends the engine only their hashes from
the second request on. It remembers them before a request is checked in full: after one that was
refused, or whose client has gone, the next good request with the same picture got 500 (vLLM issue
43941; 0.32). Here a medium that no request has brought to the engine is prepared and sent again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.multimodal.cache import LruKeyReplicatedSenderCache
from vllm.renderers import base

from hybridquant_vllm import odd_requests, unread_requests

_MOST_UNSENT = 10_000
"""Hashes after which those that the cache has dropped are forgotten."""

_unsent: set[str] = set()
"""Hashes of media that were prepared and have not been sent."""

_make_cache = base.processor_cache_from_config


class SentMediaCache(LruKeyReplicatedSenderCache):
    """vLLM's memory of the media that the engine has, without those that were not sent."""

    def is_cached_item(self, mm_hash: str) -> bool:
        """Return whether a medium need not be prepared."""
        return mm_hash not in _unsent and super().is_cached_item(mm_hash)

    def get_and_update_item(self, mm_item: Any, mm_hash: str) -> Any:
        """Return what is sent of a medium: all of it where it was prepared."""
        if mm_item is not None:
            self.invalidate(mm_hash)
            self._note_unsent(mm_hash)
        return super().get_and_update_item(mm_item, mm_hash)

    def _note_unsent(self, mm_hash: str) -> None:
        if len(_unsent) >= _MOST_UNSENT:
            dropped = [known for known in list(_unsent) if known not in self._cache]
            _unsent.difference_update(dropped)
        _unsent.add(mm_hash)


def note_sent(prompt: Any) -> None:
    """Remember that the engine was given a request with its media.

    Args:
        prompt: What vLLM has rendered, with items and hashes by modality.
    """
    _unsent.difference_update(_sent_hashes(prompt))


def _sent_hashes(prompt: Any) -> Iterator[str]:
    if not isinstance(prompt, dict) or prompt.get("type") != "multimodal":
        return
    for modality, hashes in prompt["mm_hashes"].items():
        items = prompt["mm_kwargs"][modality]
        for item, mm_hash in zip(items, hashes, strict=True):
            if item is not None:
                yield mm_hash


def _cache(config: Any) -> Any:
    cache = _make_cache(config)
    if type(cache) is LruKeyReplicatedSenderCache:
        return SentMediaCache(config.model_config)
    return cache


def register() -> None:
    """Replace the cache of a server's renderer, which vLLM makes later."""
    if unread_requests.is_server() and note_sent not in odd_requests.AFTER_SENDING:
        base.processor_cache_from_config = _cache
        odd_requests.AFTER_SENDING.append(note_sent)
