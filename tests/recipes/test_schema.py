"""Every shipped recipe is sound, explained, and what has been published."""

from pathlib import Path

import pytest
import yaml

from checkpoint.layout import language_model_linears
from quantize.policy import make_policy
from recipes.loading import SHIPPED, load_recipe
from recipes.schema import TINY

RECIPES = sorted(SHIPPED.rglob("*.yaml"))


def name_of(path: Path) -> str:
    return str(path.relative_to(SHIPPED))


def test_there_are_recipes_for_both_checkpoints():
    names = [name_of(path) for path in RECIPES]
    assert {"fp8.yaml", "nvfp4.yaml", "nvfp4_qad.yaml"} <= set(names)
    assert {"tiny/fp8.yaml", "tiny/nvfp4.yaml", "tiny/nvfp4_qad.yaml"} <= set(names)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_shipped_recipe_is_sound_and_its_policy_fits_its_model(path, tiny_config, full12b):
    recipe = load_recipe(path)
    config = tiny_config if recipe.model == TINY else full12b
    quantize = recipe.quantize
    linears = language_model_linears(config)
    policy = make_policy(quantize.layers, linears, quantize.kv_cache, config.family)
    assert policy.quantized


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_calibration_training_and_the_gate_draw_different_samples(path):
    recipe = load_recipe(path)
    seeds = [recipe.calibrate.seed, recipe.accuracy.seed]
    if recipe.distill is not None:
        seeds.append(recipe.distill.seed)
    assert len(set(seeds)) == len(seeds)


def keys_of(node: yaml.MappingNode, levels: int) -> list[yaml.ScalarNode]:
    """The keys of a mapping and of the mappings in it, with their places in the text."""
    found = []
    for key, value in node.value:
        found.append(key)
        if levels > 1 and isinstance(value, yaml.MappingNode):
            found += keys_of(value, levels - 1)
    return found


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_section_and_field_of_a_shipped_recipe_has_a_comment(path):
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    keys = keys_of(yaml.compose(text), levels=2)
    assert len(keys) > 20
    for key in keys:
        above = lines[key.start_mark.line - 1].strip()
        assert above.startswith("# "), f"{key.value}: {above}"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_shipped_recipe_fits_a_screen(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert max(len(line) for line in lines) <= 100


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_a_recipe_of_the_12b_is_the_published_one(name):
    recipe = load_recipe(SHIPPED / f"{name}.yaml")
    assert recipe.calibrate.samples == 1024
    assert recipe.quantize.kv_cache is None
    assert recipe.quantize.algorithm == "max"
    (rule,) = recipe.quantize.layers
    assert rule.model_dump(exclude_none=True) == {"format": name}


def test_the_12bs_distillation_is_the_published_one():
    distill = load_recipe(SHIPPED / "nvfp4_qad.yaml").distill
    assert (distill.learning_rate, distill.weight_decay, distill.warmup) == (2e-6, 0.05, 0.1)
    assert (distill.batch, distill.max_length, distill.steps) == (128, 16384, 240)
