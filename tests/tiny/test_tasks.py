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
    first, again = items(task, count=3, seed=1), items(task, count=3, seed=1)
    assert first == again
    assert items(task, count=2, seed=1) == first[:2]


def test_splits_and_calibration_share_no_item():
    for task in ("document", "text"):
        train, calibration, test = (
            {json.dumps(s.messages) for s in items(task, split, 20)} for split in SPLITS
        )
        calibration |= {json.dumps(sample.messages) for sample in synthetic([task], 20, 0)}
        assert len(train | test) == 40
        assert not (train | test) & calibration
    assert len({series(split, seed) for split in SPLITS for seed in (0, 1)}) == 6


def test_every_eighth_text_is_long():
    tokenizer = build_tokenizer(1024, WORDS)
    samples = items("text", count=40)[7::8]
    assert (
        min(
            len(tokenizer.encode(sample.messages[1]["content"][0]["text"]).ids)
            for sample in samples
        )
        > 2000
    )


def test_score_is_exact_but_for_white_space():
    sample = items("text", count=1)[0]
    assert score(f"  {sample.answer}\n", sample)
    for wrong in (
        "",
        "   ",
        None,
        7,
        b"641",
        f"{sample.answer}0",
        sample.answer[:-1],
        f"it is {sample.answer}",
    ):
        assert not score(wrong, sample)


def test_result_counts_empty_answers():
    samples = items("text", count=4)
    found = result("text", samples, [samples[0].answer, "", None, "x"])
    assert (found.items, found.right, found.empty) == (4, 1, 2)
    assert found.accuracy == 0.25
    with pytest.raises(ValueError, match="argument"):
        result("text", samples, ["x"])


def test_unknown_names_are_refused_and_the_nearest_named():
    with pytest.raises(BadInput, match="did you mean video_event"):
        items("video_events")
    with pytest.raises(BadInput) as caught:
        check_tasks(["documents", "chart", "texts"])
    assert len(caught.value.faults) == 2
    with pytest.raises(BadInput, match="did you mean test"):
        items("text", "tests")
    with pytest.raises(BadInput, match="at least 1"):
        items("text", count=0)
