"""Good and bad requests and clients that vanish, mixed, on a running server.

`benchmarks.soak` sends ten thousand; here are enough for each kind to come several times.
"""

import pytest

from benchmarks.soak import GOOD, VANISHING, Outcome, bad_bodies, soak, summary

REQUESTS = 240


@pytest.fixture(scope="module")
def found(server):
    return soak(server, REQUESTS, at_once=12)


@pytest.mark.server
def test_every_good_request_is_answered(found):
    assert found["unanswered"] == []
    for kind in GOOD:
        assert found["requests"][kind]["statuses"]["200"] > 5


@pytest.mark.server
def test_every_bad_request_gets_a_4xx_and_a_reason(found):
    assert found["not_refused"] == []
    kinds = {*bad_bodies("model"), "wrong content type"}
    assert kinds & set(found["requests"]) == kinds


@pytest.mark.server
def test_clients_vanish(found):
    for kind in VANISHING:
        assert found["requests"][kind]["statuses"]["0"] > 3


@pytest.mark.server
def test_the_server_still_answers(found, server):
    assert server.client().models.list().data[0].id == server.model
    assert server.process.poll() is None


def test_a_good_request_without_an_answer_is_counted():
    outcomes = [Outcome("text", 200, "", 1.0), Outcome("text", 500, "no", 1.0)]
    assert summary(outcomes)["unanswered"] == ["text: 500 no"]


@pytest.mark.parametrize("status", [200, 500, -1])
def test_a_bad_request_that_is_not_refused_is_counted(status):
    outcomes = [Outcome("not JSON", 400, "why", 1.0), Outcome("not JSON", status, "", 1.0)]
    assert len(summary(outcomes)["not_refused"]) == 1


def test_a_refusal_without_a_reason_is_counted():
    assert len(summary([Outcome("not JSON", 400, "", 1.0)])["not_refused"]) == 1
