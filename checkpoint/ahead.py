"""Makes items in a thread before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")


def made_ahead(items: Iterable[_Item], count: int) -> Iterator[_Item]:
    """Yield items in their order, while one thread makes up to `count` of those that follow.

    Args:
        items: Iterated in the thread. What it raises is raised at the item's turn.
        count: At least 1.
    """
    iterator = iter(items)
    end = object()
    thread = ThreadPoolExecutor(1, "make-ahead")
    waiting: deque[Future] = deque()
    try:
        for _ in range(count):
            waiting.append(thread.submit(next, iterator, end))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, iterator, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
