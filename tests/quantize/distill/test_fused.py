"""What is compiled for GPUs computes what transformers computes, and is compiled once for all
layers. The compiler's front end runs here; kernels are made on GPUs only.
"""

import pytest
import torch
from transformers.activations import ReLUSquaredActivation
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from checkpoint.libraries import language_model_classes
from checkpoint.products import float32_products
from quantize.distill import fused, packing
from quantize.distill.fused import convolved_row, fused_elementwise
from quantize.distill.packing import Packed, kept_apart
from tests.quantize.distill.distilling import Small, one_thread  # noqa: F401


@pytest.fixture
def compiled(monkeypatch):
    """The name of each function for which kernels would be made, as often as they would be."""
    compile_for = torch.compile
    found = []

    def compile_in_front(function, options):
        def remember(graph, inputs):
            found.append(function.__name__)
            return graph

        return compile_for(function, backend=remember)

    torch._dynamo.reset()
    monkeypatch.setattr(fused, "find_mamba_kernels", lambda: None)
    monkeypatch.setattr(torch, "compile", compile_in_front)
    yield found
    torch._dynamo.reset()


def layers_of(kind):
    modeling = language_model_classes()
    generator = torch.Generator().manual_seed(0)
    made = {
        "norm": lambda: modeling.NemotronHRMSNorm(64),
        "gated norm": lambda: Zamba2RMSNormGated(64, 16),
        "activation": ReLUSquaredActivation,
    }
    layers = []
    for _ in range(12):
        layer = made[kind]().bfloat16()
        for parameter in layer.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator).bfloat16()
        layers.append(layer)
    return layers


def results(kind, layers):
    """Outputs and gradients for rows of three lengths, then one without gradients."""
    found = []
    for length in (20, 33, 47):
        generator = torch.Generator().manual_seed(length)
        row = torch.randn(1, length, 64, generator=generator).bfloat16().requires_grad_()
        others = (row,) if kind == "gated norm" else ()
        for layer in layers:
            output = layer(row, *others)
            (gradient,) = torch.autograd.grad(output.float().sum(), row)
            found += [output.detach(), gradient]
    with torch.no_grad():
        found.append(layers[0](row, *others))
    return found


@pytest.mark.parametrize("kind", ["norm", "gated norm", "activation"])
def test_layers_share_a_compiled_function_that_computes_what_theirs_does(kind, compiled):
    layers = layers_of(kind)
    expected = results(kind, layers)
    with float32_products(), fused_elementwise():
        found = results(kind, layers)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    # With and without gradients, but not once more for each layer or length.
    assert len(compiled) == 2


def test_the_methods_are_transformers_own_afterwards(compiled):
    kinds = [language_model_classes().NemotronHRMSNorm, Zamba2RMSNormGated, ReLUSquaredActivation]
    before = [kind.forward for kind in kinds]
    with fused_elementwise():
        assert all(kind.forward != own for kind, own in zip(kinds, before, strict=True))
    assert [kind.forward for kind in kinds] == before


def test_nothing_is_compiled_without_the_kernels(compiled, monkeypatch):
    monkeypatch.setattr(fused, "find_mamba_kernels", lambda: "there is no CUDA device")
    layers = layers_of("norm")
    with fused_elementwise():
        results("norm", layers)
    assert not compiled


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_convolved_row_is_its_samples_convolved_each_by_itself(has_bias):
    lengths = (1, 2, 9, 3, 4)
    generator = torch.Generator().manual_seed(0)
    channels = torch.randn(1, 8, sum(lengths), generator=generator, requires_grad=True)
    weight = torch.randn(8, 4, generator=generator, requires_grad=True)
    bias = torch.randn(8, generator=generator, requires_grad=True) if has_bias else None
    leaves = [leaf for leaf in (channels, weight, bias) if leaf is not None]
    convolve = language_model_classes().causal_conv1d_fn
    apart = []
    for part in channels.split(lengths, dim=2):
        apart.append(convolve(part, weight, bias, activation="silu"))
    expected = torch.cat(apart, dim=2)
    found = convolved_row(channels, weight, bias, Packed(lengths).offsets)
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found.square().sum(), leaves)
    theirs = torch.autograd.grad(expected.square().sum(), leaves)
    torch.testing.assert_close(ours, theirs)


def test_compiled_for_a_cpu_it_rounds_where_the_layers_do(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(fused, "find_mamba_kernels", lambda: None)
    row = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    (layer, *_) = layers_of("gated norm")
    with torch.no_grad():
        expected = layer(row, row)
        with fused_elementwise():
            assert torch.equal(layer(row, row), expected)


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    return Small(tiny, tmp_path_factory.mktemp("fused"))


def test_where_kernels_run_they_are_given_the_whole_row_and_where_samples_begin(
    small, compiled, monkeypatch
):
    modeling = language_model_classes()
    given = []

    def scan(states, steps, decay, into, out_of, **options):
        given.append(options["seq_idx"])
        return states

    monkeypatch.setattr(packing, "find_mamba_kernels", lambda: None)
    monkeypatch.setattr(modeling, "mamba2_chunk_scan", scan)
    lengths = (5, 3, 7)
    row = torch.zeros(1, sum(lengths), small.student.config.hidden_size).bfloat16()
    with kept_apart(small.student), torch.no_grad():
        small.student(inputs_embeds=row, use_cache=False, packed=Packed(lengths))
    mixer = modeling.NemotronHMamba2Mixer
    mixers = [module for module in small.student.modules() if isinstance(module, mixer)]
    assert len(given) == len(mixers) > 0
    assert given[0].dtype == torch.int32
    assert given[0].tolist() == [[0] * 5 + [1] * 3 + [2] * 7]
    assert set(compiled) == {"convolved_row"}


def test_a_convolution_with_another_activation_is_refused(small, monkeypatch):
    monkeypatch.setattr(packing, "find_mamba_kernels", lambda: None)
    channels = torch.zeros(1, 4, 6)
    with kept_apart(small.student), pytest.raises(RuntimeError, match="activation is not SiLU"):
        language_model_classes().causal_conv1d_fn(
            channels, torch.zeros(4, 4), None, activation=None, packed=Packed((2, 4))
        )
