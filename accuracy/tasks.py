"""Six tasks with exact answers, drawn from seeds: what a checkpoint is held to before and after quantization.

Training, calibration and test items come from different series, so no test item was ever trained or calibrated on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calibrate.drawing import stream
from calibrate.lists import order, recall
from calibrate.samples import Sample
from calibrate.scenes import Scene
from calibrate.synthetic import compose, messages
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


@dataclass(frozen=True)
class Result:
    """How one task went.

    Attributes:
        task: Its name.
        items: How many were asked.
        right: How many were answered exactly.
        empty: How many answers were empty or no text; never right.
    """

    task: str
    items: int
    right: int
    empty: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.items


def check_tasks(names: Sequence[str]) -> None:
    """Refuse every name that is no task.

    Raises:
        BadInput: Naming the nearest task of each.
    """
    faults = [Fault("tasks", f"unknown task {name!r}", nearest(name, TASKS)) for name in names if name not in TASKS]
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
        random = stream("text", name, index)
        return recall(random, pairs=int(random.randint(300, 361))) if index % 8 == 7 else order(random)
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


def score(answer: object, sample: Sample) -> bool:
    """Whether `answer` is the expected one, white space normalised; an empty answer or no text is never right."""
    if not isinstance(answer, str) or sample.answer is None:
        return False
    given, expected = " ".join(answer.split()), " ".join(sample.answer.split())
    return bool(given) and given == expected


def result(task: str, samples: Sequence[Sample], answers: Sequence[object]) -> Result:
    """Score the answers to `samples`; raises `ValueError` when there is not one answer a sample."""
    pairs = list(zip(answers, samples, strict=True))
    right = sum(score(answer, sample) for answer, sample in pairs)
    empty = sum(not isinstance(answer, str) or not answer.strip() for answer, _ in pairs)
    return Result(task, len(pairs), right, empty)
