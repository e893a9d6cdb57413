"""The extension point: a format that this file registers runs through the whole flow, without any
other file knowing it.
"""

import dataclasses

import pytest
import torch

from checkpoint.opened import open_checkpoint
from export.layout import linear_formats
from export.load import load_exported
from export.manifest import read_manifest
from export.verify import verify
from pipeline.run import run
from quantize.formats.fp8 import FP8
from quantize.formats.registry import FORMATS, register_format
from recipes.loading import SHIPPED, load_recipe

QUICK = ["calibrate.samples=1", "accuracy.samples=1", "accuracy.tasks=null"]
DOCUMENTS = "[{type: synthetic, kinds: {document: 1}}]"
QUICK += [f"calibrate.sources={DOCUMENTS}", f"accuracy.sources={DOCUMENTS}"]


def _tensors(shape):
    specs = FP8.tensors(shape)
    del specs["input_scale"]
    return specs


def _pack(module):
    weight_scale = module.weight_quantizer.amax.float().reshape(()) / 448
    weight = (module.weight.detach() / weight_scale).to(torch.float8_e4m3fn)
    return {"weight": weight, "weight_scale": weight_scale}


MINE = dataclasses.replace(
    FP8,
    name="mine",
    algo="FP8_OF_A_TEST",
    input_quantizer=None,
    input_amax=None,
    tensors=_tensors,
    pack=_pack,
    fused_scales=(),
)
"""FP8 of weights alone: weights of FP8's dtype, but other tensors, quantizers and `quant_algo`."""


@pytest.fixture(autouse=True)
def registered():
    register_format(MINE)
    yield
    del FORMATS[MINE.name]


def make(tiny, output, *overrides) -> int:
    paths = [f"model={tiny}", f"output={output}"]
    return run(load_recipe(SHIPPED / "tiny" / "fp8.yaml", [*QUICK, *paths, *overrides]))


@pytest.mark.parametrize("memory", ["whole", "layers"])
def test_it_is_quantized_written_verified_and_read_back(tiny, tmp_path, memory):
    output = tmp_path / "out"
    rule = "quantize.layers=[{format: mine}]"
    assert make(tiny, output, rule, f"quantize.memory={memory}") == 0
    exported = open_checkpoint(output)
    assert verify(output, tiny) == []
    assert set(linear_formats(exported.config).values()) == {"mine"}
    assert exported.config.raw["quantization_config"]["quant_algo"] == "FP8_OF_A_TEST"
    assert read_manifest(output).formats == {"mine": len(exported.linears)}
    model = load_exported(exported)
    linear = exported.linears[0].name
    module = model.language_model.get_submodule(exported.config.family.native_module(linear))
    scale = exported.tensors.read(f"{linear}.weight_scale")
    weight = exported.tensors.read(f"{linear}.weight").float() * scale
    assert torch.equal(module.weight, weight.bfloat16())


def test_it_is_told_from_fp8_in_a_mix(tiny, tmp_path):
    output = tmp_path / "out"
    rules = "quantize.layers=[{format: fp8}, {format: mine, kind: mlp}]"
    assert make(tiny, output, rules) == 0
    assert verify(output, tiny) == []
    exported = open_checkpoint(output)
    formats = linear_formats(exported.config)
    by_kind = {linear.kind: formats[linear.name] for linear in exported.linears}
    assert by_kind == {"mamba": "fp8", "mlp": "mine", "attention": "fp8"}


def test_an_algorithm_and_a_search_take_it_by_its_properties(tiny, tmp_path):
    recipe = load_recipe(
        SHIPPED / "tiny" / "fp8.yaml",
        ["quantize.layers=[{format: mine}]", "quantize.auto={bits: 8, formats: [mine, nvfp4]}"],
    )
    assert recipe.quantize.auto.formats == ("mine", "nvfp4")
    output = tmp_path / "out"
    rule = "quantize.layers=[{format: mine, kind: attention}]"
    assert make(tiny, output, rule, "quantize.algorithm=mse") == 0
    assert verify(output, tiny) == []
