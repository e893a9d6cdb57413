"""Agreement figures and the gate: zero for the same model, and every miss is named."""

import dataclasses
import json
import math

import pytest
import torch
from pydantic import ValidationError

from accuracy.agreement import States, compare
from accuracy.gate import judge, show
from accuracy.paired import Paired
from accuracy.settings import Accuracy, Tasks

IMAGE = 7


@pytest.fixture
def lm_head():
    torch.manual_seed(0)
    return torch.nn.Linear(16, 50, bias=False)


def states(noise: float, group: str = "text", length: int = 40) -> States:
    """States of one prompt; those of two noises differ in nothing else."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(length, 16, generator=generator)
    tokens = torch.randint(8, 50, (length,), generator=generator)
    tokens[10:20] = IMAGE
    disturbance = torch.randn(length, 16, generator=torch.Generator().manual_seed(2))
    return States(group, tokens, hidden + noise * disturbance)


def test_a_model_agrees_with_itself(lm_head):
    agreement = compare([states(0)], [states(0)], lm_head, IMAGE)["all"]
    assert agreement.kl == 0
    assert agreement.top1 == 1
    assert agreement.perplexity_ratio == 1


def test_positions_before_a_placeholder_are_not_counted(lm_head):
    assert compare([states(0)], [states(0)], lm_head, IMAGE)["all"].tokens == 39 - 10


def test_kl_equals_torchs_and_the_perplexity_is_of_the_next_token(lm_head):
    ours = states(0)
    theirs = states(0.5)
    agreement = compare([ours], [theirs], lm_head, IMAGE)["all"]
    keep = ours.token_ids[1:] != IMAGE
    p = lm_head(ours.hidden[:-1][keep]).log_softmax(-1)
    q = lm_head(theirs.hidden[:-1][keep]).log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    nll = torch.nn.functional.nll_loss(p, ours.token_ids[1:][keep])
    assert agreement.kl == pytest.approx(expected.item(), rel=1e-4)
    assert agreement.perplexity == pytest.approx(math.exp(nll.item()), rel=1e-4)


def test_more_noise_is_worse_on_every_figure(lm_head):
    little = compare([states(0)], [states(0.1)], lm_head, IMAGE)["all"]
    much = compare([states(0)], [states(1.0)], lm_head, IMAGE)["all"]
    assert little.kl < much.kl
    assert little.top1 > much.top1
    assert abs(little.perplexity_ratio - 1) < abs(much.perplexity_ratio - 1)


def test_groups_are_told_apart(lm_head):
    reference = [states(0, "text"), states(0, "video")]
    variant = [states(0, "text"), states(1.0, "video")]
    measured = compare(reference, variant, lm_head, IMAGE)
    assert measured["text"].kl == 0
    assert measured["video"].kl > 0
    assert measured["all"].prompts == 2


def test_models_that_saw_different_tokens_are_not_compared(lm_head):
    other = dataclasses.replace(states(0), token_ids=states(0).token_ids.flip(0))
    with pytest.raises(AssertionError, match="different tokens"):
        compare([states(0)], [other], lm_head, IMAGE)


@pytest.mark.parametrize(
    ("required", "named"),
    [
        (Accuracy(max_kl=1e-6), "KL"),
        (Accuracy(min_top1=0.9999), "top-1 agreement"),
        (Accuracy(max_perplexity_ratio=0.5), "perplexity ratio"),
    ],
)
def test_a_missed_requirement_is_named(lm_head, required, named):
    verdict = judge(compare([states(0)], [states(1.0)], lm_head, IMAGE), required)
    assert not verdict.passed
    assert [sentence.startswith(named) for sentence in verdict.missed] == [True]


def test_nan_never_passes(lm_head):
    broken = states(0)
    broken.hidden[3] = float("nan")
    measured = compare([states(0)], [broken], lm_head, IMAGE)
    assert not judge(measured, Accuracy(max_kl=100.0)).passed
    assert judge(measured, Accuracy(max_kl=100.0, min_top1=0.0)).missed


def test_nothing_compared_never_passes(lm_head):
    assert not judge(compare([], [], lm_head, IMAGE), Accuracy()).passed


def test_a_gate_without_requirements_passes_and_one_that_is_met_too(lm_head):
    measured = compare([states(0)], [states(0)], lm_head, IMAGE)
    assert judge(measured, Accuracy()).passed
    strict = Accuracy(max_kl=1e-9, min_top1=1.0, max_perplexity_ratio=1.0)
    assert judge(measured, strict).passed


def tasks_row(loss: float) -> Paired:
    """The mean over the tasks, with the points that the variant lost."""
    return Paired("mean", 100, 0.9, 0.9 - loss / 100, low=-0.1, high=0.1, empty=0)


@pytest.mark.parametrize(
    ("loss", "passed"), [(0.0, True), (2.9, True), (3.1, False), (float("nan"), False)]
)
def test_the_gate_limits_what_the_mean_of_the_tasks_loses(lm_head, loss, passed):
    measured = compare([states(0)], [states(0)], lm_head, IMAGE)
    required = Accuracy(tasks=Tasks(max_loss=3.0))
    verdict = judge(measured, required, [tasks_row(loss)])
    assert verdict.passed is passed
    if not passed:
        (missed,) = verdict.missed
        assert missed == f"task loss in points is {loss:g}, allowed is at most 3"


def test_a_gate_that_passed_says_how_near_each_limit_was(lm_head, capsys):
    measured = compare([states(0)], [states(0.01)], lm_head, IMAGE)
    overall = measured["all"]
    required = Accuracy(max_kl=2, min_top1=0.25, max_perplexity_ratio=1.5, tasks=Tasks(max_loss=3))
    show(judge(measured, required, [tasks_row(2.5)]))
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"gate passed: KL {overall.kl:.4g} ≤ 2, top-1 agreement {overall.top1:.4g} ≥ 0.25, "
        f"perplexity ratio {overall.perplexity_ratio:.4g} ≤ 1.5, task loss in points 2.5 ≤ 3"
    )
    show(judge(measured, Accuracy()))
    assert capsys.readouterr().out.splitlines()[-1] == "gate passed: the recipe sets no limits"


def test_a_gate_that_was_missed_names_what_it_missed_alone(lm_head, capsys):
    measured = compare([states(0)], [states(1.0)], lm_head, IMAGE)
    show(judge(measured, Accuracy(max_kl=1e-6, min_top1=0.0)))
    lines = capsys.readouterr().out.splitlines()
    kl = measured["all"].kl
    assert lines[-1] == f"gate missed: KL is {kl:.4g}, allowed is at most 1e-06"
    assert "top-1 agreement" not in lines[-2]


def test_tasks_without_a_limit_are_shown_and_not_judged(lm_head):
    measured = compare([states(0)], [states(0)], lm_head, IMAGE)
    verdict = judge(measured, Accuracy(tasks=Tasks()), [tasks_row(50.0)])
    assert verdict.passed
    assert verdict.as_dict()["tasks"][0]["task"] == "mean"


def test_a_verdict_is_written_as_json(lm_head):
    verdict = judge(compare([states(0)], [states(1.0)], lm_head, IMAGE), Accuracy(max_kl=1e-6))
    written = json.loads(json.dumps(verdict.as_dict()))
    assert written["passed"] is False
    assert written["missed"] == list(verdict.missed)
    assert written["agreement"]["all"]["kl"] == verdict.measured["all"].kl


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_kl", 0),
        ("max_kl", float("nan")),
        ("min_top1", 1.01),
        ("min_top1", float("nan")),
        ("max_perplexity_ratio", float("inf")),
        ("samples", 0),
        ("samples", True),
    ],
)
def test_a_requirement_out_of_its_range_is_refused(field, value):
    with pytest.raises(ValidationError):
        Accuracy(**{field: value})
