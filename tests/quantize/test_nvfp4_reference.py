"""NVFP4 fake quantization without CUDA: ModelOpt's own asserts there, so ours stands in, with
ModelOpt's rounding.
"""

import subprocess
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer

from quantize.formats.nvfp4_reference import fake_quantize, fake_quantize_static
from quantize.formats.registry import FORMATS

ROOT = Path(__file__).parents[2]
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the trap is of machines without CUDA")
def test_modelopts_own_fake_quantization_asserts_without_cuda():
    """Upstream trap: if this ever passes, the reference backend can go."""
    quantizer = TensorQuantizer(
        QuantizerAttributeConfig(**FORMATS["nvfp4"].input_quantizer), amax=torch.tensor(6.0)
    )
    with pytest.raises(AssertionError, match="must be a CUDA tensor"):
        quantizer(torch.randn(2, 32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the trap is of machines without CUDA")
def test_importing_the_formats_changes_nothing_in_modelopt_until_a_cpu_needs_it():
    """Upstream trap: ModelOpt's own function for static scales raises on a CPU, so it is replaced;
    if this fails at the first call, the replacement can go.
    """
    code = """
import torch
from modelopt.torch.quantization.nn.modules import tensor_quantizer
before = tensor_quantizer.static_blockwise_fp4_fake_quant
from quantize.formats.registry import FORMATS
assert tensor_quantizer.static_blockwise_fp4_fake_quant is before
arguments = torch.ones(1, 16), torch.ones(1, 1), torch.tensor(1.0)
try:
    before(*arguments)
except Exception as error:
    assert "triton" in str(error).lower(), error
else:
    raise AssertionError("ModelOpt's own function runs on a CPU")
FORMATS["nvfp4"].quantizer_settings("weight_quantizer", "cpu", is_searched=True)
tensor_quantizer.static_blockwise_fp4_fake_quant(*arguments)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_result_is_a_value_of_the_format():
    inputs, amax = torch.randn(64, 256), torch.tensor(5.0)
    outputs = fake_quantize(inputs, amax)
    scale_2 = amax / (6 * 448)
    blocks = inputs.abs().unflatten(-1, (-1, 16)).amax(-1, keepdim=True)
    scale = (blocks / 6 / scale_2).clamp(max=448).to(torch.float8_e4m3fn).float() * scale_2
    steps = outputs.abs().unflatten(-1, (-1, 16)) / scale
    assert (steps[..., None] - VALUES).abs().amin(-1).max() < 1e-5


def test_it_equals_packing_and_unpacking_by_the_exporter():
    """For blocks that are not tiny, fake quantization and exported bytes give the same weight."""
    weight = torch.randn(128, 256, dtype=torch.bfloat16)
    linear = torch.nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    linear.weight.data.copy_(weight)
    settings = {
        q: FORMATS["nvfp4"].quantizer_settings(q, "cpu")
        for q in ("weight_quantizer", "input_quantizer")
    }
    entries = [
        {"quantizer_name": f"*{q}", "cfg": cfg, "enable": True} for q, cfg in settings.items()
    ]
    model = torch.nn.Sequential(linear)
    mtq.quantize(
        model,
        {"quant_cfg": entries, "algorithm": "max"},
        lambda m: m(torch.randn(4, 256).bfloat16()),
    )
    unpacked = FORMATS["nvfp4"].unpack(FORMATS["nvfp4"].pack(model[0]))
    assert torch.equal(model[0].weight_quantizer(weight), unpacked.to(torch.bfloat16))


def test_blocks_above_the_calibrated_range_saturate():
    assert float(fake_quantize(torch.full((1, 16), 100.0), torch.tensor(6.0)).max()) == 6.0


def test_zeros_and_tiny_blocks_stay_finite():
    inputs = torch.zeros(2, 32)
    inputs[0, :16] = 1e-9
    assert torch.equal(fake_quantize(inputs, torch.tensor(6.0)), torch.zeros(2, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shape_and_dtype_are_kept_and_the_gradient_passes_through(dtype):
    quantizer = TensorQuantizer(
        QuantizerAttributeConfig(**FORMATS["nvfp4"].quantizer_settings("input_quantizer", "cpu")),
        amax=torch.tensor(4.0),
    )
    inputs = torch.randn(2, 3, 32, dtype=dtype, requires_grad=True)
    outputs = quantizer(inputs)
    outputs.sum().backward()
    assert outputs.shape == inputs.shape
    assert outputs.dtype == dtype
    assert torch.equal(inputs.grad, torch.ones_like(inputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs ModelOpt's Triton kernel")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_it_equals_modelopts_triton_kernel_bit_for_bit(dtype):
    settings = QuantizerAttributeConfig(**FORMATS["nvfp4"].input_quantizer)
    for magnitude in (1e-3, 1.0, 100.0):
        inputs = magnitude * torch.randn(512, 1024, device="cuda", dtype=dtype)
        for amax in (inputs.abs().amax().float(), inputs.abs().amax().float() / 4):
            theirs = TensorQuantizer(settings, amax=amax)(inputs)
            assert torch.equal(fake_quantize(inputs, amax), theirs)


def searched(linear: torch.nn.Linear, algorithm: dict) -> torch.nn.Module:
    settings = {
        q: FORMATS["nvfp4"].quantizer_settings(q, "cpu", is_searched=True)
        for q in ("weight_quantizer", "input_quantizer")
    }
    entries = [
        {"quantizer_name": f"*{q}", "cfg": cfg, "enable": True} for q, cfg in settings.items()
    ]
    model = torch.nn.Sequential(linear)
    mtq.quantize(
        model,
        {"quant_cfg": entries, "algorithm": algorithm},
        lambda m: m(torch.randn(4, 256).bfloat16()),
    )
    return model[0]


def test_searched_block_scales_equal_packing_and_unpacking_by_the_exporter():
    """But for scales between two E4M3 numbers, which the exporter and the kernel round each in its
    own way.
    """
    torch.manual_seed(0)
    linear = searched(
        torch.nn.Linear(256, 128, bias=False, dtype=torch.bfloat16), {"method": "max"}
    )
    unpacked = FORMATS["nvfp4"].unpack(FORMATS["nvfp4"].pack(linear)).to(torch.bfloat16)
    assert float((linear.weight_quantizer(linear.weight) != unpacked).float().mean()) < 0.05


def test_the_search_without_cuda_never_raises_the_squared_error():
    torch.manual_seed(0)
    weight, errors = torch.randn(64, 256, dtype=torch.bfloat16), []
    for algorithm in ({"method": "max"}, {"method": "mse", "fp8_scale_sweep": True}):
        linear = torch.nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)
        linear.weight.data.copy_(weight)
        unpacked = FORMATS["nvfp4"].unpack(FORMATS["nvfp4"].pack(searched(linear, algorithm)))
        errors.append(float((unpacked - weight.float()).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_a_searched_block_of_zeros_stays_zero():
    inputs = torch.cat([torch.zeros(1, 16), torch.full((1, 16), 3.0)])
    assert torch.equal(
        fake_quantize_static(inputs, torch.tensor([[0.0], [3.0]]), torch.tensor(3.0)), inputs
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs ModelOpt's Triton kernel")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_searched_scales_equal_modelopts_triton_kernel_bit_for_bit(dtype):
    from modelopt.torch.kernels.quantization.gemm.fp4_kernel import static_blockwise_fp4_fake_quant

    inputs = torch.randn(512, 1024, device="cuda", dtype=dtype)
    amax = inputs.abs().unflatten(-1, (-1, 16)).amax(-1).float()
    for share in (1.0, 0.7):
        theirs = static_blockwise_fp4_fake_quant(
            inputs.view(-1, 16), amax * share, amax.max()
        ).view_as(inputs)
        assert torch.equal(fake_quantize_static(inputs, amax * share, amax.max()), theirs)
