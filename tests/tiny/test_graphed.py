"""Training's pool of batches: new ones as they come, earlier ones in between, and an end."""

import itertools
import time

import pytest

from tiny.training.graphed import GraphedSteps, Pool


def slow(count, seconds):
    for number in range(count):
        time.sleep(seconds)
        yield number


def test_batches_are_repeated_while_none_is_new():
    pool = Pool(slow(50, 0.05), "cpu", first=2)
    drawn = list(itertools.islice(pool, 200))
    pool.close()
    assert [is_new for _, is_new in drawn[:2]] == [True, True]
    new = [batch for batch, is_new in drawn if is_new]
    assert new == sorted(set(new))
    assert any(not is_new for _, is_new in drawn)
    assert not pool.thread.is_alive()


def test_only_the_last_batches_are_held():
    pool = Pool(iter(range(30)), "cpu", size=4, first=10**6)
    for _ in range(30):
        batch, _ = next(iter(pool))
    assert batch == 29
    assert sorted(pool.held) == [26, 27, 28, 29]
    pool.close()


def test_an_error_of_the_loader_reaches_the_trainer():
    def broken():
        yield 0
        raise ValueError("a worker died")

    pool = Pool(broken(), "cpu", first=10**6)
    with pytest.raises(ValueError, match="a worker died"):
        list(itertools.islice(pool, 3))
    pool.close()


def test_steps_run_directly_without_cuda():
    steps = GraphedSteps(lambda batch, rate: (batch, rate), "cpu")
    assert steps("batch", 0.5) == ("batch", 0.5)
