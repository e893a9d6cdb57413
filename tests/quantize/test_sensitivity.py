"""Automatic mixed precision: ModelOpt's scores, the mix under a size, and the directory that comes
of it.
"""

import json

import pytest
import torch

from calibrate.forward import embed
from calibrate.samples import Skipped
from checkpoint.config import read_config
from checkpoint.faults import BadInput
from checkpoint.layout import language_model_linears
from checkpoint.native import load_model
from export.manifest import read_manifest
from export.verify import verify
from pipeline.inputs import prompts_of
from pipeline.run import run
from quantize.policy import Rule, make_policy
from quantize.ptq import quantize_model
from quantize.sensitivity import POSITIONS, SENSITIVITY, format_bits, search_formats
from recipes.loading import SHIPPED, load_recipe

BITS = 6.0
ATTENTION = "[{format: bf16}, {format: nvfp4, kind: attention}]"
TEXT = "[{type: synthetic, kinds: {text: 1}}]"


def recipe(tiny, output, *more):
    quick = [
        "accuracy.tasks=null",
        "calibrate.samples=2",
        "accuracy.samples=1",
        f"calibrate.sources={TEXT}",
        f"accuracy.sources={TEXT}",
    ]
    quick += [
        f"quantize.layers={ATTENTION}",
        f"quantize.auto.bits={BITS}",
        "quantize.auto.samples=1",
    ]
    given = {override.partition("=")[0] for override in more}
    quick = [override for override in quick if override.partition("=")[0] not in given]
    paths = [f"model={tiny}", f"output={output}"]
    return load_recipe(SHIPPED / "tiny" / "nvfp4.yaml", [*quick, *paths, *more])


@pytest.fixture(scope="module")
def made(one_thread, tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("auto") / "out"
    assert run(recipe(tiny, output)) in (0, 1)  # the gate is another test's
    return output, json.loads((output / SENSITIVITY).read_text())


def test_the_mix_ends_verified_as_what_vllm_loads(made, tiny):
    output, found = made
    assert verify(output, tiny) == []
    assert read_manifest(output).formats == found["chosen"]["formats"]
    section = read_config(output).raw["quantization_config"]
    assert section["quant_algo"] in ("MIXED_PRECISION", "NVFP4", "FP8")


def test_the_mix_keeps_to_the_size_and_to_the_linears_it_was_given(made, tiny_config):
    chosen = made[1]["chosen"]
    assert format_bits("nvfp4") == 4.5
    assert 4.5 <= chosen["bits"] <= BITS
    linears = language_model_linears(tiny_config)
    attention = [linear for linear in linears if linear.kind == "attention"]
    assert sum(chosen["formats"].values()) == len(linears)
    assert chosen["formats"]["bf16"] >= len(linears) - len(attention)
    assert {score["linear"] for score in made[1]["scores"]} == {linear.name for linear in attention}
    assert {score["format"] for score in made[1]["scores"]} == {"nvfp4", "fp8"}


def test_the_curve_goes_from_the_smallest_format_to_bf16_with_ever_less_error(made):
    curve = made[1]["curve"]
    assert (curve[0]["bits"], curve[-1]["bits"], curve[-1]["kl"]) == (4.5, 16.0, 0.0)
    assert [point["bits"] for point in curve] == sorted({point["bits"] for point in curve})
    errors = [point["kl"] for point in curve]
    assert errors == sorted(errors, reverse=True)
    assert made[1]["chosen"] in curve


def test_fp8_has_less_error_than_nvfp4_by_every_score(made):
    by_linear = {}
    for score in made[1]["scores"]:
        by_linear.setdefault(score["linear"], {})[score["format"]] = score
    for scores in by_linear.values():
        for measure in ("kl", "weight_mse", "input_mse"):
            assert 0 < scores["fp8"][measure] < scores["nvfp4"][measure]


def first_prompt(checkpoint, recipe):
    prompts = prompts_of(recipe.calibrate, "calibrate", checkpoint, recipe.video, Skipped())
    return next(prompts)


def test_a_linears_kl_is_that_of_the_model_with_it_alone_quantized(
    made, tiny, tiny_checkpoint, tiny_config, tmp_path
):
    name = next(linear.name for linear in tiny_checkpoint.linears if linear.short == "o_proj")
    prompt = first_prompt(tiny_checkpoint, recipe(tiny, tmp_path / "out"))
    model = load_model(tiny_checkpoint)
    inputs = embed(model, prompt, tiny_config).inputs_embeds[None]

    @torch.no_grad()
    def logits():
        output = model.language_model(inputs_embeds=inputs, use_cache=False)
        return output.logits[0, -POSITIONS:].double().log_softmax(-1)

    reference = logits()
    policy = make_policy([Rule(format="nvfp4", name=name)], tiny_checkpoint.linears)
    quantize_model(model.language_model, policy, logits)
    expected = float((reference.exp() * (reference - logits())).sum())
    (score,) = (s for s in made[1]["scores"] if (s["linear"], s["format"]) == (name, "nvfp4"))
    assert score["kl"] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("formats", [("nvfp4", "nvfp4_weight_only"), ("nvfp4_weight_only", "fp8")])
def test_formats_are_told_apart_by_their_quantizers(
    one_thread, tiny, tiny_checkpoint, tiny_config, tiny_model, tmp_path, formats
):
    """NVFP4 and weight-only NVFP4 have the same bits and the same weights."""
    layer = tiny_config.pattern.index("*")
    rule = Rule(format="nvfp4", layers=(layer,), name="o_proj")
    policy = make_policy([rule], tiny_checkpoint.linears)
    prompt = first_prompt(tiny_checkpoint, recipe(tiny, tmp_path / "out"))
    given = [embed(tiny_model, prompt, tiny_config)]
    found = search_formats(tiny_model.language_model, policy, given, formats, 5.0)
    scores = {score.format: score for score in found.scores}
    assert set(scores) == set(formats)
    weight_only = scores["nvfp4_weight_only"]
    assert weight_only.input_mse == 0
    assert weight_only.kl > 0
    assert weight_only.weight_mse > 0
    if "nvfp4" in formats:
        assert scores["nvfp4"].weight_mse == weight_only.weight_mse
        assert scores["nvfp4"].input_mse > 0
        # ModelOpt may give the second of two formats of one size the KL of the first.
        assert scores["nvfp4"].kl >= weight_only.kl
        assert set(found.policy.quantized.values()) <= set(formats)
    else:
        assert scores["fp8"].weight_mse < weight_only.weight_mse
        assert set(found.policy.quantized.values()) == {"nvfp4_weight_only"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["quantize.auto.bits=4.2"],
            r"quantize\.auto\.bits: 4\.2 bits per weight are less than nvfp4's 4\.5",
        ),
        (["quantize.auto.formats=[fp8]"], r"6 bits per weight are less than fp8's 8"),
        (["distill={steps: 1}"], r"quantize\.auto: a distillation must know its formats"),
    ],
)
def test_a_mix_that_cannot_be_is_refused_before_weights_are_loaded(
    tiny, tmp_path, monkeypatch, overrides, message
):
    monkeypatch.setattr("pipeline.search.load_model", None)
    with pytest.raises(BadInput, match=message):
        run(recipe(tiny, tmp_path / "out", *overrides))


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ("[int4]", r"quantize\.auto\.formats: .*unknown format 'int4': choose from fp8, nvfp4"),
        ("[nvfp44]", r"unknown format 'nvfp44': did you mean nvfp4\?"),
        (
            "[nvfp4, fp8, nvfp4_weight_only]",
            r"nvfp4 and nvfp4_weight_only both have 4\.5 bits per weight, .* give one of them",
        ),
        ("[fp8, fp8]", r"fp8 and fp8 both have 8 bits per weight"),
    ],
)
def test_formats_that_cannot_be_searched_are_refused_in_one_sentence(
    tiny, tmp_path, formats, message
):
    with pytest.raises(BadInput, match=message) as caught:
        recipe(tiny, tmp_path / "out", f"quantize.auto.formats={formats}")
    assert len(caught.value.faults) == 1
