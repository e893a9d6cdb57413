"""The tiny checkpoint's tasks: items that never change, splits that share none, exact scores."""

import json

import pytest

from accuracy.scoring import result, score
from calibrate.sources.synthetic.kinds import synthetic
from checkpoint.faults import BadInput
from checkpoint.tokenizer import build_tokenizer
from tiny.tasks import SPLITS, TASKS, check_tasks, items, series
from tiny.tokenizer import WORDS


@pytest.mark.parametrize("task", TASKS)
def test_items_are_the_same_every_time(task):
    first = items(task, count=3, seed=1)
    assert items(task, count=3, seed=1) == first
    assert items(task, count=2, seed=1) == first[:2]


def contents(samples):
    return {json.dumps(sample.messages) for sample in samples}


@pytest.mark.parametrize("task", ["document", "text"])
def test_splits_and_calibration_share_no_item(task):
    train = contents(items(task, "train", 20))
    test = contents(items(task, "test", 20))
    calibration = contents(items(task, "calibration", 20)) | contents(synthetic([task], 20, 0))
    assert len(train | test) == 40
    assert not (train | test) & calibration


def test_every_split_and_seed_has_a_series_of_its_own():
    names = {series(split, seed) for split in SPLITS for seed in (0, 1)}
    assert len(names) == 6


def test_every_eighth_text_is_long():
    tokenizer = build_tokenizer(1024, WORDS)
    for sample in items("text", count=40)[7::8]:
        question = sample.messages[1]["content"][0]["text"]
        assert len(tokenizer.encode(question).ids) > 2000


def test_score_is_exact_but_for_white_space():
    sample = items("text", count=1)[0]
    answer = sample.answer
    assert score(f"  {answer}\n", sample)
    for wrong in ("", "   ", None, 7, b"641", f"{answer}0", answer[:-1], f"it is {answer}"):
        assert not score(wrong, sample)


def test_result_counts_empty_answers():
    samples = items("text", count=4)
    found = result("text", samples, [samples[0].answer, "", None, "x"])
    assert (found.items, found.right, found.empty) == (4, 1, 2)
    assert found.accuracy == 0.25
    with pytest.raises(ValueError, match="argument"):
        result("text", samples, ["x"])


def test_unknown_names_are_refused_with_the_nearest_one():
    with pytest.raises(BadInput, match="did you mean video_event"):
        items("video_events")
    with pytest.raises(BadInput) as caught:
        check_tasks(["documents", "chart", "texts"])
    assert len(caught.value.faults) == 2
    with pytest.raises(BadInput, match="did you mean test"):
        items("text", "tests")
    with pytest.raises(BadInput, match="at least 1"):
        items("text", count=0)
