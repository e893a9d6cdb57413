"""Samples of the next step are decoded and embedded while a step trains, and judged at their
turn.
"""

import itertools
import threading
import time

import pytest

from checkpoint.faults import BadInput, Fault
from quantize.distill.ahead import MadeAhead, Place
from tests.quantize.distill.distilling import wait_until
from tests.quantize.distill.test_dataset import dataset, five, named, numbered


def places(count):
    for number in range(count):
        yield Place(number, number, 0.0), f"sample {number}"


def test_samples_keep_their_order_whether_or_not_they_were_embedded_ahead():
    ahead = MadeAhead(places(100), str.upper)
    found = [next(ahead), next(ahead)]
    wait_until(lambda: ahead._decoded.qsize() == 16)
    ahead.embed_decoded(3)
    assert len(ahead._embedded) == 3
    found += ahead
    assert [row for _, row in found] == [f"SAMPLE {number}" for number in range(100)]
    ahead.close()


def test_decoding_goes_on_in_another_thread_and_embedding_in_this_one():
    decoded_by = []
    embedded_by = []

    def decode():
        for sample in places(3):
            decoded_by.append(threading.current_thread())
            yield sample

    def embed(prepared):
        embedded_by.append(threading.current_thread())
        return {}

    ahead = MadeAhead(decode(), embed)
    wait_until(lambda: len(decoded_by) == 3)
    assert not embedded_by
    ahead.embed_decoded(2)
    assert set(embedded_by) == {threading.current_thread()}
    assert threading.current_thread() not in decoded_by
    ahead.close()


def test_no_more_samples_are_decoded_than_may_wait():
    decoded = []

    def decode():
        for sample in places(1000):
            decoded.append(sample)
            yield sample

    ahead = MadeAhead(decode(), lambda prepared: {})
    wait_until(lambda: ahead._decoded.qsize() == 16)
    time.sleep(0.05)
    assert len(decoded) == 16
    ahead.close()


def test_what_later_samples_raise_waits_for_their_turn():
    def broken():
        yield from places(2)
        raise BadInput(Fault("line 3", "is no JSON"))

    ahead = MadeAhead(broken(), lambda prepared: {})
    wait_until(lambda: not ahead._thread.is_alive())
    ahead.embed_decoded(9)
    assert [next(ahead)[0].number, next(ahead)[0].number] == [0, 1]
    for _ in range(2):
        with pytest.raises(BadInput, match="line 3: is no JSON"):
            next(ahead)
    ahead.close()


@pytest.mark.parametrize("error", [RuntimeError("a defect"), MemoryError(), SystemExit(3)])
def test_an_error_of_the_thread_is_raised_as_it_is_and_ends_the_thread(error):
    def broken():
        yield from places(1)
        raise error

    ahead = MadeAhead(broken(), lambda prepared: {})
    next(ahead)
    with pytest.raises(type(error)) as raised:
        next(ahead)
    assert raised.value is error
    wait_until(lambda: not ahead._thread.is_alive())


def test_an_error_of_embedding_ahead_waits_for_its_turn():
    def embed(prepared):
        if prepared == "sample 1":
            raise RuntimeError("a defect")
        return {}

    ahead = MadeAhead(places(9), embed)
    wait_until(lambda: not ahead._thread.is_alive())
    ahead.embed_decoded(9)
    assert next(ahead)[0].number == 0
    with pytest.raises(RuntimeError, match="a defect"):
        next(ahead)


def test_closing_does_not_wait_for_a_source_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("quantize.distill.ahead._SECONDS_TO_END", 0.01)
    answer = threading.Event()

    def silent():
        yield from places(1)
        answer.wait(20)
        yield from places(100)

    ahead = MadeAhead(silent(), lambda prepared: {})
    next(ahead)
    began = time.monotonic()
    ahead.close()
    assert time.monotonic() - began < 5
    assert ahead._thread.daemon
    answer.set()
    wait_until(lambda: not ahead._thread.is_alive())
    assert ahead._decoded.qsize() == 1


@pytest.mark.parametrize("taken", [0, 1, 20])
def test_closing_ends_the_thread(taken):
    ahead = MadeAhead(places(1000), lambda prepared: {})
    for _ in range(taken):
        next(ahead)
    ahead.close()
    assert not ahead._thread.is_alive()
    ahead.close()


def test_a_sample_that_cannot_be_embedded_counts_at_its_turn():
    def embed(sample, rate):
        if sample.id == "4":
            raise BadInput(Fault("4", "has no token to learn from"))
        return named(sample, rate)

    rows = dataset(five, embed, step_rows=1)
    begun = iter(rows)
    assert next(begun)["name"] == "2"
    wait_until(lambda: rows._ahead._decoded.qsize() == 16)
    rows._step_samples = 9
    rows.embed_ahead()
    assert next(begun)["name"] == "3"
    with pytest.raises(BadInput, match="has no token to learn from"):
        next(begun)
    rows.close()


def test_a_dataset_yields_the_same_rows_with_and_without_embedding_ahead():
    def endless():
        return map(numbered, itertools.count())

    plain = dataset(endless, step_rows=3)
    expected = [row["name"] for row in itertools.islice(plain, 30)]
    hurried = dataset(endless, step_rows=3)
    found = []
    for row in itertools.islice(hurried, 30):
        hurried.embed_ahead()
        found.append(row["name"])
    assert found == expected
    plain.close()
    hurried.close()
