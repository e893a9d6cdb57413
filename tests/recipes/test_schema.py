"""Recipes: every shipped one is sound, and every mistake is one sentence that names the field and
the remedy.
"""

from pathlib import Path

import pytest

from checkpoint.faults import BadInput
from checkpoint.layout import language_model_linears
from quantize.policy import Rule, make_policy
from recipes.schema import load_recipe

SHIPPED = sorted(Path("recipes").rglob("*.yaml"))
TINY = Path("recipes/tiny/fp8.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_a_shipped_recipe_is_sound_and_its_policy_fits_its_model(path, tiny_config, full12b):
    recipe = load_recipe(path)
    config = tiny_config if recipe.model == "tiny" else full12b
    rules = [Rule(**rule.model_dump()) for rule in recipe.quantize.layers]
    assert make_policy(rules, language_model_linears(config), recipe.quantize.kv_cache).quantized
    assert recipe.accuracy.seed != recipe.calibrate.seed
    assert recipe.distill is None or recipe.distill.seed not in (
        recipe.accuracy.seed,
        recipe.calibrate.seed,
    )


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_every_field_of_a_shipped_recipe_has_a_comment(path):
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        field, colon, value = line.strip().partition(":")
        is_section = colon and not value and not line.startswith(" ")
        if colon and not field.startswith(("#", "-")) and not is_section:
            assert lines[number - 1].strip().startswith("#"), line


def test_the_12b_recipe_is_the_published_one():
    recipe = load_recipe(Path("recipes/fp8.yaml"))
    assert recipe.calibrate.samples == 1024
    assert recipe.quantize.kv_cache is None
    assert [rule.model_dump(exclude_none=True) for rule in recipe.quantize.layers] == [
        {"format": "fp8"}
    ]


def test_the_12bs_distillation_is_the_published_one():
    distill = load_recipe(Path("recipes/nvfp4_qad.yaml")).distill
    assert (distill.learning_rate, distill.weight_decay, distill.warmup) == (2e-6, 0.05, 0.1)
    assert (distill.batch, distill.max_length, distill.steps) == (128, 16384, 240)


def test_overrides_reach_any_field_by_its_dotted_name():
    overrides = [
        "calibrate.samples=64",
        "quantize.layers.0.kind=mlp",
        "serve.video_pruning_rate=0.5",
        "model=a b",
    ]
    recipe = load_recipe(TINY, overrides)
    assert recipe.calibrate.samples == 64
    assert recipe.quantize.layers[0].kind == "mlp"
    assert recipe.serve.video_pruning_rate == 0.5
    assert recipe.model == "a b"
    assert (
        load_recipe(Path("recipes/tiny/nvfp4.yaml"), ["quantize.auto.bits=5"]).quantize.auto.bits
        == 5
    )  # null there


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("calibrate.sample=64", "calibrate.sample: unknown field .did you mean samples"),
        (
            "distill.learning_rat=1",
            "distill.learning_rat: unknown field .did you mean learning_rate",
        ),
        ("calibrat.samples=64", "calibrat: unknown field .did you mean calibrate"),
        ("quantize.layers.0.formt=fp8", "formt: unknown field .did you mean format"),
        ("calibrate.sources.0.paths=x", r"sources\.0\.paths: unknown field"),
        ("calibrate.samples=many", "calibrate.samples: 'many'.*integer"),
        ("calibrate.samples=0", "calibrate.samples: 0: .*greater than or equal to 1"),
        ("serve.video_pruning_rate=1", "video_pruning_rate: 1: .*less than 1"),
        ("calibrate.sources=[]", "at least 1"),
        ("calibrate.sources=[{type: csv}]", "csv"),
        ("quantize.kv_cache=int4", "kv_cache: 'int4'"),
        ("calibrate.samples", "is no recipe and no key=value"),
        ("model.name=x", "name is no field there"),
        ("output=[1", "is no YAML"),
    ],
)
def test_a_wrong_override_is_one_clear_error(override, message):
    with pytest.raises(BadInput, match=message):
        load_recipe(TINY, [override])


def test_all_wrong_fields_are_named_at_once():
    with pytest.raises(BadInput) as caught:
        load_recipe(TINY, ["calibrate.samples=x", "accuracy.sed=3", "serve.video_pruning_rate=2"])
    assert len(caught.value.faults) == 3


def test_a_missing_field_is_named(tmp_path):
    (tmp_path / "r.yaml").write_text("model: tiny\nquantize:\n  layers: [{format: fp8}]\n")
    with pytest.raises(BadInput, match="output: is missing"):
        load_recipe(tmp_path / "r.yaml")


def test_a_misspelt_recipe_names_the_nearest():
    with pytest.raises(BadInput, match=r"did you mean recipes/tiny/fp8\.yaml"):
        load_recipe(Path("recipes/tiny/fp88.yaml"))


def test_a_file_that_is_no_yaml(tmp_path):
    (tmp_path / "r.yaml").write_text("a: [")
    with pytest.raises(BadInput, match="cannot be read as YAML"):
        load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("- a")
    with pytest.raises(BadInput, match="holds no mapping"):
        load_recipe(tmp_path / "r.yaml")
