"""Clips asked of stock vLLM and of ours: how each server is started, and what the ratios are."""

from itertools import cycle
from pathlib import Path

import pytest
from json_server import JsonHandler, serving

from benchmarks.paired_servers import Asker
from benchmarks.video_serving import OURS, STOCK, STOCK_THREADS, again, sides
from serve.command import TORCH_THREADS


def test_one_stock_server_has_a_thread_for_each_core(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    flags = ["--load-format", "dummy"]
    one, many, ours = sides(tiny, 0.75, flags, tmp_path, {"A": "1"})
    assert (one.name, many.name, ours.name) == (STOCK, STOCK_THREADS, OURS)
    assert [side.is_plain for side in (one, many, ours)] == [True, True, False]
    assert TORCH_THREADS not in one.variables
    assert many.variables == {**one.variables, TORCH_THREADS: "16"}
    assert one.flags == many.flags
    assert "0.75" in one.flags
    assert ours.settings == {"video.pruning_rate": "0.75"}
    assert ours.variables["A"] == "1"
    for side in (one, many, ours):
        assert side.flags[-2:] == ("--load-format", "dummy")


class Clips:
    """A server whose answers begin after so many seconds, the first one after ten times as many."""

    def __init__(self, seconds):
        self._seconds = cycle([10 * seconds, seconds])

    def ask(self, kind, files, tokens):
        return {"first": next(self._seconds)}


def test_ratios_are_above_one_where_ours_is_faster():
    askers = {STOCK: Clips(3.0), STOCK_THREADS: Clips(2.0), OURS: Clips(1.0)}
    found = again(askers, lambda: Path("clip.mp4"), 2)
    assert found["median without the first"] == {STOCK: 3.0, STOCK_THREADS: 2.0, OURS: 1.0}
    assert found["times faster"] == pytest.approx({STOCK: 3.0, STOCK_THREADS: 2.0})


class EndsWithError(JsonHandler):
    """Answers as vLLM does whose engine ends after the answer has begun."""

    def do_GET(self):
        self.send(200, {"data": [{"id": "stub"}]})

    def do_POST(self):
        self.request_body()
        self.send(200, 'data: {"error": {"message": "EngineCore encountered an issue"}}\n')


def test_an_error_within_an_answer_names_the_reason():
    with serving(EndsWithError) as server:
        asker = Asker(server.url)
        with pytest.raises(OSError, match=r"ended its answer: .*EngineCore"):
            asker.ask("video", [Path("clip.mp4")], 1)
