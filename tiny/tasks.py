"""Draws the items of six tasks with exact answers, which measure a checkpoint before and after
quantization.

Items for training, calibration and tests come from different series, so no test item was used for
training or calibration.
"""

from __future__ import annotations

from collections.abc import Sequence

from calibrate.samples import Sample
from calibrate.sources.synthetic.drawing import random_state
from calibrate.sources.synthetic.kinds import compose, messages
from calibrate.sources.synthetic.lists import order, recall
from calibrate.sources.synthetic.scenes import Scene
from checkpoint.faults import BadInput, Fault, nearest, raise_if_any

TASKS = {
    "document": "read a code of 5 or 6 characters among other text on a page",
    "chart": "name a chart's largest bar or read one bar's value",
    "images": "say which of two to four pictures shows something",
    "video_event": "name the digit or the colour of a box that is in one to three frames of a clip",
    "video_static": "read a code that stands still in a clip where other things move",
    "text": "order six to eight words by frequency, or recall a value from a list of 300 to 360",
}
SPLITS = ("train", "calibration", "test")
TEST_ITEMS = 300
"""Items per task in a full test; one item is then a third of a percentage point."""
_LONG_TEXT_EVERY = 8
"""One text item in this many is a list of over 2,000 tokens."""


def check_tasks(names: Sequence[str]) -> None:
    """Check that every name is a task.

    Raises:
        BadInput: With every unknown name and the task that is nearest to it.
    """
    unknown = [name for name in names if name not in TASKS]
    raise_if_any(Fault("tasks", f"unknown task {name!r}", nearest(name, TASKS)) for name in unknown)


def series(split: str, seed: int) -> str:
    """Return the name of a series of items.

    The name of the split is part of it, so the series of two splits have no item in common.

    Args:
        split: One of `SPLITS`.
        seed: Any number; each gives another series.

    Raises:
        BadInput: The split is unknown; the message names the nearest one.
    """
    if split not in SPLITS:
        raise BadInput(Fault("split", f"unknown split {split!r}", nearest(split, SPLITS)))
    return f"{split}-{seed}"


def scene(task: str, name: str, index: int) -> Scene:
    """Return one item of a task before encoding.

    The long lists of `text` are at fixed positions, so that a test of a few items has them too.

    Args:
        task: One of `TASKS`.
        name: The series, as `series` returns it.
        index: Position in the series.
    """
    if task != "text":
        return compose(task, name, index)
    random = random_state("text", name, index)
    if index % _LONG_TEXT_EVERY == _LONG_TEXT_EVERY - 1:
        return recall(random, pairs=int(random.randint(300, 361)))
    return order(random)


def items(task: str, split: str = "test", count: int = TEST_ITEMS, seed: int = 0) -> list[Sample]:
    """Return the first items of a task as samples.

    Args:
        task: One of `TASKS`.
        split: One of `SPLITS`.
        count: Number of items.
        seed: Of the series.

    Raises:
        BadInput: The task or the split is unknown, or the count is below 1.
    """
    check_tasks([task])
    name = series(split, seed)
    if count < 1:
        raise BadInput(Fault("items", f"count is {count}", "give at least 1"))
    samples = []
    for index in range(count):
        drawn = scene(task, name, index)
        sample = Sample(f"{task}-{name}-{index}", messages(drawn), "synthetic", drawn.answer)
        samples.append(sample)
    return samples
