"""The layer policy: what rules select, and every rule that is wrong said before anything runs."""

import pytest

from checkpoint.faults import BadInput
from checkpoint.layout import language_model_linears
from quantize.policy import Rule, make_policy


@pytest.fixture
def linears(full12b):
    return language_model_linears(full12b)


def test_one_rule_takes_every_linear_of_the_language_model_and_nothing_else(linears):
    policy = make_policy([Rule(format="fp8")], linears)
    assert policy.counts() == {"fp8": 136}
    assert policy.algo == "FP8"
    assert not [
        name
        for name in policy.quantized
        if "lm_head" in name or "embeddings" in name or "conv1d" in name
    ]


def test_the_last_rule_that_matches_wins(linears):
    rules = [
        Rule(format="fp8"),
        Rule(format="bf16", kind="attention"),
        Rule(format="fp8", name="o_proj"),
        Rule(format="bf16", layers=(0, -1)),
    ]
    formats = make_policy(rules, linears).formats
    at = "language_model.backbone.layers.{}.mixer.{}".format
    assert formats[at(7, "q_proj")] == "bf16"
    assert formats[at(7, "o_proj")] == "fp8"
    assert formats[at(0, "in_proj")] == "bf16"
    assert formats[at(61, "up_proj")] == "bf16"
    assert formats[at(2, "in_proj")] == "fp8"


def test_two_formats_are_mixed_precision(linears):
    assert (
        make_policy([Rule(format="nvfp4"), Rule(format="fp8", kind="attention")], linears).algo
        == "MIXED_PRECISION"
    )


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule(format="fp8"), Rule(format="bf16", name="gate_proj")], "matches no layer"),
        ([Rule(format="fp8"), Rule(format="bf16", layers=(62,))], "matches no layer"),
        ([Rule(format="fp8"), Rule(format="bf16", kind="mlp", name="q_proj")], "matches no layer"),
        ([Rule(format="fp9")], "did you mean fp8"),
        ([Rule(format="fp8", kind="mamba2")], "did you mean mamba"),
        ([Rule(format="fp8"), Rule(format="bf16")], "no layer is quantized"),
        ([Rule(format="fp8"), Rule(format="bf16", name="q_proj")], "vLLM fuses them"),
    ],
)
def test_a_wrong_rule_is_an_error(linears, rules, message):
    with pytest.raises(BadInput, match=message):
        make_policy(rules, linears)


def test_every_wrong_rule_is_named_at_once(linears):
    with pytest.raises(BadInput) as caught:
        make_policy(
            [Rule(format="fp8"), Rule(format="int4"), Rule(format="bf16", name="nothing")], linears
        )
    assert len(caught.value.faults) == 2
