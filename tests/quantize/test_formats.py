"""What every registered format promises, and the register itself."""

import dataclasses

import pytest
import torch
from modelopt.torch.quantization import quantize
from torch import nn

from checkpoint.files import DTYPES
from quantize.formats.fp8 import FP8
from quantize.formats.registry import FORMATS, find_format, register_format
from serve.precision import PRECISIONS

ALL = sorted(FORMATS)
SHAPE = (64, 128)


@pytest.fixture
def linear(request) -> nn.Module:
    """A linear of normally distributed BF16 weights, calibrated in a format."""
    return calibrated(FORMATS[request.param])


def calibrated(format) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.bfloat16))
    nn.init.normal_(model[0].weight, std=0.02)
    entries = [{"quantizer_name": "*", "enable": False}]
    for quantizer in format.quantizers:
        settings = format.quantizer_settings(quantizer, "cpu")
        entries.append({"quantizer_name": f"*{quantizer}", "cfg": settings, "enable": True})
    inputs = torch.randn(8, SHAPE[1], dtype=torch.bfloat16)
    quantize(model, {"quant_cfg": entries, "algorithm": "max"}, lambda m: m(inputs))
    return model[0]


def test_the_formats_of_the_project_are_registered():
    algos = {format.algo for format in FORMATS.values()}
    assert algos == {"FP8", "NVFP4", "W4A16_NVFP4"}


@pytest.mark.parametrize("name", ALL)
def test_every_format_can_be_served(name):
    assert FORMATS[name].algo in PRECISIONS


@pytest.mark.parametrize(("linear", "name"), [(name, name) for name in ALL], indirect=["linear"])
def test_a_packed_linear_has_the_tensors_of_its_format(linear, name):
    packed = FORMATS[name].pack(linear)
    specs = FORMATS[name].tensors(SHAPE)
    assert set(packed) == set(specs) == set(FORMATS[name].suffixes)
    for suffix, spec in specs.items():
        assert tuple(packed[suffix].shape) == spec.shape, suffix
        assert packed[suffix].dtype == DTYPES[spec.dtype], suffix


@pytest.mark.parametrize(("linear", "name"), [(name, name) for name in ALL], indirect=["linear"])
def test_unpacking_stays_within_the_errors_that_the_format_states(linear, name):
    format = FORMATS[name]
    packed = format.pack(linear)
    source = linear.weight.detach().float()
    error = (format.unpack(packed) - source).abs()
    assert bool((error <= format.error_bound(source, packed)).all())
    relative = float(error.norm() / source.norm())
    assert relative == pytest.approx(format.relative_error, rel=0.1)
    assert bool((source.abs() <= format.largest(packed) * (1 + 2**-4)).all())


@pytest.mark.parametrize("name", ALL)
def test_a_format_with_an_input_quantizer_stores_its_scale(name):
    format = FORMATS[name]
    has_scale = "input_scale" in format.suffixes
    assert ("input_quantizer" in format.quantizers) == has_scale
    assert (format.input_amax is not None) == has_scale
    assert set(format.fused_scales) <= set(format.suffixes)


@pytest.mark.parametrize(("linear", "name"), [(name, name) for name in ALL], indirect=["linear"])
def test_the_stored_input_scale_represents_the_calibrated_range(linear, name):
    format = FORMATS[name]
    if format.input_amax is None:
        assert not linear.input_quantizer.is_enabled
        return
    scale = format.pack(linear)["input_scale"]
    found = format.input_amax(scale)
    assert float(found) == pytest.approx(float(linear.input_quantizer.amax), rel=1e-6)


def test_weight_only_nvfp4_packs_the_weights_of_nvfp4():
    full = FORMATS["nvfp4"].pack(calibrated(FORMATS["nvfp4"]))
    weight_only = FORMATS["nvfp4_weight_only"].pack(calibrated(FORMATS["nvfp4_weight_only"]))
    del full["input_scale"]
    assert set(full) == set(weight_only)
    for suffix, tensor in full.items():
        assert torch.equal(
            tensor.view(-1).view(torch.uint8), weight_only[suffix].view(-1).view(torch.uint8)
        )


def test_sizes_on_disk():
    bits = {name: format.bits for name, format in FORMATS.items()}
    assert bits == {"fp8": 8.0, "nvfp4": 4.5, "nvfp4_weight_only": 4.5}


def test_a_weight_only_format_has_no_input_quantizer_to_ask_for():
    with pytest.raises(ValueError, match="nvfp4_weight_only has no input quantizer"):
        FORMATS["nvfp4_weight_only"].quantizer_settings("input_quantizer", "cpu")


@pytest.mark.parametrize("algo", ["W4A16_NVFP4", "w4a16_nvfp4"])
def test_a_format_is_found_by_its_quant_algo_as_vllm_finds_it(algo):
    assert find_format(algo) is FORMATS["nvfp4_weight_only"]


@pytest.mark.parametrize("algo", [None, "", "NVFP4_AWQ", 4])
def test_an_unknown_quant_algo_is_no_format(algo):
    assert find_format(algo) is None


def test_a_name_or_quant_algo_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="bf16 is the name of what is not quantized"):
        register_format(dataclasses.replace(FP8, name="bf16", algo="BF16"))
    with pytest.raises(ValueError, match="quant_algo FP8 is that of the format fp8"):
        register_format(dataclasses.replace(FP8, name="other"))
    assert "other" not in FORMATS
