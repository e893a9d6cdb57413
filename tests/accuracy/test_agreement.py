"""Agreement figures: zero for the same model, worse for a worse one; the gate fails on what it
should.
"""

import dataclasses
import math

import pytest
import torch

from accuracy.agreement import States, compare
from accuracy.gate import judge
from accuracy.settings import Accuracy

IMAGE = 7


@pytest.fixture
def lm_head():
    torch.manual_seed(0)
    return torch.nn.Linear(16, 50, bias=False)


def states(noise: float, group: str = "text", length: int = 40) -> States:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(length, 16, generator=generator)
    tokens = torch.randint(8, 50, (length,), generator=generator)
    tokens[10:20] = IMAGE
    return States(
        group,
        tokens,
        hidden + noise * torch.randn(length, 16, generator=torch.Generator().manual_seed(2)),
    )


def test_a_model_agrees_with_itself(lm_head):
    agreement = compare([states(0)], [states(0)], lm_head, IMAGE)["all"]
    assert agreement.kl == 0
    assert agreement.top1 == 1
    assert agreement.perplexity_ratio == 1


def test_positions_before_a_placeholder_are_not_counted(lm_head):
    assert compare([states(0)], [states(0)], lm_head, IMAGE)["all"].tokens == 39 - 10


def test_kl_equals_torchs_and_the_perplexity_is_of_the_next_token(lm_head):
    ours, theirs = states(0), states(0.5)
    agreement = compare([ours], [theirs], lm_head, IMAGE)["all"]
    keep = ours.token_ids[1:] != IMAGE
    p, q = (lm_head(s.hidden[:-1][keep]).log_softmax(-1) for s in (ours, theirs))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    nll = torch.nn.functional.nll_loss(p, ours.token_ids[1:][keep])
    assert agreement.kl == pytest.approx(expected.item(), rel=1e-4)
    assert agreement.perplexity == pytest.approx(math.exp(nll.item()), rel=1e-4)


def test_more_noise_is_worse_on_every_figure(lm_head):
    little, much = (compare([states(0)], [states(n)], lm_head, IMAGE)["all"] for n in (0.1, 1.0))
    assert little.kl < much.kl
    assert little.top1 > much.top1


def test_groups_are_told_apart(lm_head):
    pairs = [(states(0, "text"), states(0, "text")), (states(0, "video"), states(1.0, "video"))]
    measured = compare([a for a, _ in pairs], [b for _, b in pairs], lm_head, IMAGE)
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
