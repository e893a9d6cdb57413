"""The statistics of paired scores, against values worked out by hand or known from tables."""

import numpy as np
import pytest

from accuracy.suites.harness import Item
from accuracy.suites.intervals import (
    items_to_tell,
    largest_share,
    mcnemar,
    paired_difference,
)
from accuracy.suites.verdict import TaskScores, compare_tasks, gate_passed


def scores(right: int, items: int) -> np.ndarray:
    return np.array([1.0] * right + [0.0] * (items - right))


def task_scores(values, failed: int = 0) -> TaskScores:
    found = {str(number): float(value) for number, value in enumerate(values)}
    return TaskScores(found, len(found) + failed, failed)


def compared(reference, variant, max_loss: float = 1.5, groups=None):
    items = []
    for number in range(len(reference.scores)):
        items.append(Item(str(number), "" if groups is None else groups[number]))
    return compare_tasks({"a": reference}, {"a": variant}, {"a": items}, max_loss, {})[0]


@pytest.mark.parametrize(
    ("worse", "better", "p_value"), [(0, 0, 1.0), (5, 0, 0.0625), (1, 9, 0.021484375), (4, 4, 1.0)]
)
def test_mcnemars_exact_test(worse, better, p_value):
    assert mcnemar(worse, better) == pytest.approx(p_value)


@pytest.mark.parametrize(
    ("count", "items", "share"), [(0, 10, 0.30850), (0, 100, 0.036217), (1, 20, 0.248733)]
)
def test_the_interval_of_clopper_and_pearson(count, items, share):
    assert largest_share(count, items) == pytest.approx(share, abs=1e-5)


def test_the_interval_is_that_of_the_paired_differences():
    """80 of 1,000 items change, 50 to the worse: the normal approximation gives ±1.75 points."""
    reference = scores(500, 1000)
    variant = reference.copy()
    variant[:50] = 0
    variant[500:530] = 1
    found, _ = paired_difference(reference, variant)
    assert found.difference == pytest.approx(-0.02)
    assert (found.worse, found.better) == (50, 30)
    half = 1.96 * np.sqrt((0.08 - 0.02**2) / 1000)
    assert found.low == pytest.approx(-0.02 - half, abs=0.001)
    assert found.high == pytest.approx(-0.02 + half, abs=0.001)
    assert found.p_value == pytest.approx(mcnemar(50, 30))


def test_shares_have_no_mcnemar():
    found, _ = paired_difference(np.array([0.5, 1.0]), np.array([0.6, 1.0]))
    assert found.p_value is None


def test_a_figure_over_groups_weighs_groups_alike():
    """Three items of one group and one of another: the mean of their means."""
    reference = np.array([1.0, 1.0, 1.0, 0.0])
    variant = np.array([1.0, 1.0, 1.0, 1.0])
    found, _ = paired_difference(reference, variant, ["x", "x", "x", "y"])
    assert (found.reference, found.variant) == (0.5, 1.0)


def test_equal_answers_to_few_items_prove_nothing():
    row = compared(task_scores(scores(9, 10)), task_scores(scores(9, 10)))
    assert row.found.low == pytest.approx(-0.3085, abs=1e-4)
    assert row.outcome == "too small"
    assert row.reason == "too small to tell; 245 items would do"


def test_as_many_items_as_were_said_to_do_are_enough():
    row = compared(task_scores(scores(200, 245)), task_scores(scores(200, 245)))
    assert row.outcome == "passed"


def test_a_loss_beyond_the_gate_fails():
    row = compared(task_scores(scores(900, 1000)), task_scores(scores(800, 1000)))
    assert row.outcome == "failed"
    assert row.reason == "10.0 points lost, 1.5 allowed"
    assert not gate_passed([row])


def test_a_small_loss_of_few_items_needs_more():
    reference = scores(150, 200)
    variant = reference.copy()
    variant[:13] = 0
    variant[150:162] = 1
    row = compared(task_scores(reference), task_scores(variant))
    assert row.outcome == "too small"
    width = row.found.difference - row.found.low
    assert row.items_needed == pytest.approx(200 * (width / 0.01) ** 2, abs=2)


def test_items_to_tell_is_none_where_no_number_of_items_helps():
    found, _ = paired_difference(scores(90, 100), scores(80, 100))
    assert items_to_tell(found, 0.05) is None


def test_failed_requests_count_neither_right_nor_wrong():
    """300 of 300 both; 3 more failed under the variant: the figures stay at 100 %."""
    reference = task_scores(scores(303, 303))
    variant = TaskScores(dict(list(reference.scores.items())[:300]), 303, failed=3)
    row = compared(reference, variant)
    assert row.found.items == 300
    assert row.found.reference == pytest.approx(1)
    assert row.found.variant == pytest.approx(1)
    assert row.variant_failed == 3
    assert row.outcome == "passed"


def test_too_many_failed_requests_are_not_judged():
    reference = task_scores(scores(310, 310))
    variant = TaskScores(dict(list(reference.scores.items())[:300]), 310, failed=10)
    row = compared(reference, variant)
    assert row.outcome == "incomplete"
    assert not gate_passed([row])


def test_the_mean_weighs_tasks_alike_and_is_not_judged():
    items = {"a": [Item(str(n)) for n in range(10)], "b": [Item(str(n)) for n in range(1000)]}
    reference = {"a": task_scores(scores(10, 10)), "b": task_scores(scores(0, 1000))}
    rows = compare_tasks(reference, reference, items, 1.5, {})
    assert [row.task for row in rows] == ["a", "b", "mean"]
    assert rows[-1].found.reference == 0.5
    assert not gate_passed(rows)  # ten items do not tell
