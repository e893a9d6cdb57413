"""Six tasks with exact answers, drawn from seeds: what a checkpoint is held to before and after
quantization.

Training, calibration and test items come from different series, so no test item was ever trained or
calibrated on.
"""

from __future__ import annotations

from collections.abc import Sequence

from calibrate.samples import Sample
from calibrate.sources.synthetic.drawing import random_state
from calibrate.sources.synthetic.kinds import compose, messages
from calibrate.sources.synthetic.lists import order, recall
from calibrate.sources.synthetic.scenes import Scene
from checkpoint.faults import BadInput, Fault, nearest

TASKS = {
    "document": "read a code of 5 or 6 characters among other text on a page",
    "chart": "name a chart's largest bar or read one bar's value",
    "images": "say which of two to four pictures shows something",
    "video_event": "name the digit or the colour of what stands in a clip for one to three frames",
    "video_static": "read a code that stands still in a clip where other things move",
    "text": "order six to eight words by how often a run has them, or recall a value from a list of 300 to 360 pairs",
}
SPLITS = ("train", "calibration", "test")
TEST_ITEMS = 300
"""Items of a task in a full test; one item is then a third of a point."""


def check_tasks(names: Sequence[str]) -> None:
    """Refuse every name that is no task.

    Raises:
        BadInput: Naming the nearest task of each.
    """
    faults = [
        Fault("tasks", f"unknown task {name!r}", nearest(name, TASKS))
        for name in names
        if name not in TASKS
    ]
    if faults:
        raise BadInput(*faults)


def series(split: str, seed: int) -> str:
    """The series of a split; the split's name is part of it, so series of two splits share no item.

    Raises:
        BadInput: For an unknown split.
    """
    if split not in SPLITS:
        raise BadInput(Fault("split", f"unknown split {split!r}", nearest(split, SPLITS)))
    return f"{split}-{seed}"


def scene(task: str, name: str, index: int) -> Scene:
    """Item number `index` of a task in a series, before encoding.

    Every eighth item of `text` is a list of over 2,000 tokens, however few are asked for.
    """
    if task == "text":
        random = random_state("text", name, index)
        return (
            recall(random, pairs=int(random.randint(300, 361))) if index % 8 == 7 else order(random)
        )
    return compose(task, name, index)


def items(task: str, split: str = "test", count: int = TEST_ITEMS, seed: int = 0) -> list[Sample]:
    """The first `count` items of a task.

    Raises:
        BadInput: For an unknown task or split, or a count under 1.
    """
    check_tasks([task])
    name = series(split, seed)
    if count < 1:
        raise BadInput(Fault("items", f"count is {count}", "give at least 1"))
    scenes = (scene(task, name, index) for index in range(count))
    return [Sample(f"{task}-{name}-{index}", messages(drawn), "synthetic", drawn.answer)
            for index, drawn in enumerate(scenes)]  # fmt: skip
