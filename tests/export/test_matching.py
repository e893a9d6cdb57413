"""Our replay of vLLM's exclude rule equals vLLM's, and our list says what it should to every
version.
"""

import json
from pathlib import Path

import pytest

from checkpoint.layout import language_model_linears
from export.matching import exclude_list, is_excluded
from quantize.policy import Rule, make_policy

LAYERS = "language_model.model.layers."
SCRIPT = Path(__file__).with_name("exclusion_by_vllm.py")


def modules(config) -> list[str]:
    names = {config.family.vllm_module(linear.name) for linear in language_model_linears(config)}
    fused = {name.rpartition(".")[0] + ".qkv_proj" for name in names if name.endswith("q_proj")}
    parts = {name for name in names if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")}
    conv = {name.rpartition(".")[0] + ".conv1d" for name in names if name.endswith("in_proj")}
    others = {
        "language_model.lm_head",
        "language_model.model.embed_tokens",
        "mlp1.1",
        "vision_model.model.encoder",
    }
    return sorted((names - parts) | fused | conv | others)


def test_everything_unquantized_is_excluded_and_nothing_else(full12b):
    rules = [
        Rule(format="fp8"),
        Rule(format="bf16", layers=(7, 61)),
        Rule(format="bf16", name="out_proj"),
    ]
    policy = make_policy(rules, language_model_linears(full12b))
    unquantized = [name for name, format in policy.formats.items() if format == "bf16"]
    entries = exclude_list(unquantized, full12b.family)
    excluded = {name for name in modules(full12b) if is_excluded(name, entries, full12b.family)}
    vllm_module = full12b.family.vllm_module
    wanted = {vllm_module(name) for name, format in policy.formats.items() if format == "bf16"}
    parts = {name for name in wanted if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")}
    wanted = (wanted - parts) | {f"{LAYERS}7.mixer.qkv_proj", "language_model.lm_head", "mlp1.1"}
    wanted |= {
        name
        for name in modules(full12b)
        if name.endswith("conv1d") or name.startswith("vision_model")
    }
    assert excluded - {"language_model.model.embed_tokens"} == wanted


def test_no_entry_holds_a_control_character(full12b):
    names = [linear.name for linear in language_model_linears(full12b)]
    assert all(entry.isprintable() for entry in exclude_list(names, full12b.family))


@pytest.mark.parametrize("entry", ["lm_head", "*lm_head*", "language_model.lm_head"])
def test_spellings_that_reach_lm_head(full12b, entry):
    assert is_excluded("language_model.lm_head", [entry], full12b.family)


def test_our_rule_is_vllms_on_sound_and_on_strange_lists(vllm_process, full12b):
    attention = [f"language_model.backbone.layers.7.mixer.{part}_proj" for part in "qkv"]
    mamba = [linear.name for linear in language_model_linears(full12b) if linear.kind == "mamba"]
    lists = [
        exclude_list(attention, full12b.family),
        exclude_list(mamba, full12b.family),
        ["language_model*"],
        ["backbone.layers.7.mixer.q_proj"],
        ["*.layers.7.*", "lm_head*"],
        ["mixer.conv1d"],
        ["language_model.backbone.layers.1*"],
        ["lm_head.\0backbone.pt_name_sentinel"],
        [],
    ]
    asked = {"lists": lists, "modules": modules(full12b)}
    result = vllm_process.run(SCRIPT, stdin=json.dumps(asked))
    assert result.returncode == 0, result.stderr[-2000:]
    answers = json.loads(result.stdout.splitlines()[-1])
    for entries, theirs in zip(lists, answers, strict=True):
        ours = {name: is_excluded(name, entries, full12b.family) for name in theirs}
        assert ours == theirs, entries
