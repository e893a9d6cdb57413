"""Parts of a measurement: done one after another or at the same time, kept until all are done."""

import functools
import os
import time

import pytest

from benchmarks.parts import Parts, at_once


def slow(seconds):
    time.sleep(seconds)
    return {}


def mark_process():
    os.environ["BENCHMARK_PREPARED"] = "yes"


def is_marked():
    return {"prepared": os.environ.get("BENCHMARK_PREPARED")}


@pytest.mark.parametrize("jobs", [1, 2])
def test_parts_are_done_one_after_another_or_at_the_same_time(jobs):
    todo = {name: functools.partial(dict, text=[name]) for name in ("bf16", "fp8", "nvfp4")}
    assert dict(at_once(todo, jobs)) == {name: {"text": [name]} for name in todo}


def test_a_new_process_is_prepared_before_its_work():
    found = dict(at_once({"bf16": is_marked}, 2, mark_process))
    assert found == {"bf16": {"prepared": "yes"}}


def test_parts_that_were_running_when_another_failed_are_kept():
    todo = {"bf16": functools.partial(slow, 2), "nvfp4": functools.partial(slow, -1)}
    kept = []

    def keep():
        for name, _ in at_once(todo, 2):
            kept.append(name)

    with pytest.raises(ValueError, match="non-negative"):
        keep()
    assert kept == ["bf16"]


def test_a_finished_part_is_not_done_again_with_the_same_settings(tmp_path):
    path = tmp_path / "measured.json"
    done = []

    def work():
        done.append("work")
        return {"seconds": 1.5}

    parts = Parts(path, {"items": 3})
    parts.noted["gpu"] = {"load": 2.0}
    assert parts.part("load", work) == {"seconds": 1.5}
    resumed = Parts(path, {"items": 3})
    assert resumed.part("load", work) == {"seconds": 1.5}
    assert resumed.noted == {"gpu": {"load": 2.0}}
    assert done == ["work"]
    Parts(path, {"items": 4}).part("load", work)
    assert done == ["work", "work"]
    resumed.done()
    assert not path.exists()
