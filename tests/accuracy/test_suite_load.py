"""How many requests at a time: the choice on a server of known speed, with a clock of its own."""

import pytest

from accuracy.suites.load import Load, Queue


def asked(answers: int, capacity: int, queue=None, **options) -> Load:
    """A load after so many answers of a server that computes `capacity` requests at a time, each in
    a second.
    """
    seconds = [0.0]

    def read():
        return queue(load.at_once) if queue else None

    given = {"at_once": 8, "most": 256, "is_fixed": False, **options}
    load = Load(**given, queue=read, clock=lambda: seconds[0])
    for _ in range(answers):
        seconds[0] += 1 / min(load.at_once, capacity)
        load.answered()
    load.finish()
    return load


def test_the_number_grows_while_the_server_answers_faster():
    load = asked(1000, capacity=64)
    assert [step.at_once for step in load.steps][:5] == [8, 16, 32, 64, 128]
    assert load.steps[0].rate == pytest.approx(8)
    assert load.steps[3].rate == pytest.approx(64)


def test_two_steps_without_a_gain_end_the_search_at_the_fastest():
    load = asked(3000, capacity=64)
    assert [step.at_once for step in load.steps] == [8, 16, 32, 64, 128, 256, 64]
    assert load.at_once == 64


def test_one_step_without_a_gain_may_be_chance():
    """A server that is as slow at 16 as at 8, and faster at 32."""
    seconds = [0.0]
    load = Load(8, 256, is_fixed=False, queue=lambda: None, clock=lambda: seconds[0])
    for _ in range(200):
        seconds[0] += 1 / (8 if load.at_once == 16 else load.at_once)
        load.answered()
    assert load.at_once > 32


def test_requests_that_always_wait_in_the_server_end_the_search():
    load = asked(1000, capacity=512, queue=lambda at_once: Queue(16, max(0, at_once - 16)))
    assert load.at_once == 32
    assert [step.at_once for step in load.steps] == [8, 16, 32, 32]
    assert (load.steps[2].running, load.steps[2].waiting) == (16, 16)


def test_there_is_a_most():
    assert asked(500, capacity=64, most=16).at_once == 16


def test_a_given_number_stays_and_is_measured():
    load = asked(100, capacity=4, at_once=6, most=6, is_fixed=True)
    assert load.at_once == 6
    (step,) = load.steps
    assert (step.at_once, step.answers) == (6, 100)
    assert step.rate == pytest.approx(4)
