"""ModelOpt is applied to the policy's layers and to nothing else, and a quantizer without a range
stops the run.
"""

import pytest
import torch

from checkpoint.faults import BadInput
from checkpoint.layout import language_model_linears
from checkpoint.native import module_name
from quantize.policy import Rule, make_policy
from quantize.ptq import packed_linears, quantize_model


@pytest.fixture
def linears(tiny_config):
    return language_model_linears(tiny_config)


def calibrate(model, value: float = 1.0):
    torch.manual_seed(0)
    embeds = value * torch.randn(1, 48, model.config.text_config.hidden_size, dtype=torch.bfloat16)
    return lambda: model.language_model(inputs_embeds=embeds, use_cache=False)


def enabled(model) -> set[str]:
    return {
        name
        for name, module in model.language_model.named_modules()
        if name.endswith("quantizer") and module.is_enabled
    }


def test_exactly_the_policys_quantizers_are_enabled_out_proj_included(tiny_model, linears):
    policy = make_policy([Rule(format="fp8"), Rule(format="bf16", kind="attention")], linears)
    quantize_model(tiny_model.language_model, policy, calibrate(tiny_model))
    wanted = {
        f"{module_name(n)}.{q}_quantizer" for n in policy.quantized for q in ("weight", "input")
    }
    assert enabled(tiny_model) == wanted
    assert any(name.endswith("out_proj.input_quantizer") for name in wanted)


def test_the_input_scale_is_the_absolute_maximum_over_448(tiny_model, linears):
    seen = []
    first = tiny_model.language_model.get_submodule("model.layers.0.mixer.in_proj")
    hook = first.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].abs().max().float())
    )
    policy = make_policy([Rule(format="fp8")], linears)
    quantize_model(tiny_model.language_model, policy, calibrate(tiny_model))
    hook.remove()
    packed = {p.name: p.tensors for p in packed_linears(tiny_model.language_model, policy)}
    tensors = packed["language_model.backbone.layers.0.mixer.in_proj"]
    assert torch.equal(tensors["input_scale"], max(seen) / 448)
    assert torch.equal(tensors["weight_scale"], first.weight.abs().max().float() / 448)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (float("nan"), "layers.0.mixer.in_proj.input_quantizer: was given NaN"),
        (0.0, "after calibration"),
    ],
)
def test_a_quantizer_without_a_finite_positive_range_stops_the_run_by_name(
    tiny_model, linears, value, found
):
    with pytest.raises(BadInput) as caught:
        quantize_model(
            tiny_model.language_model,
            make_policy([Rule(format="fp8")], linears),
            calibrate(tiny_model, value),
        )
    assert found in str(caught.value)
    assert "input_quantizer" in str(caught.value)


def test_fp8_kv_cache_gives_every_attention_layer_a_scale(tiny_model, linears):
    policy = make_policy([Rule(format="fp8")], linears, kv_cache="fp8")
    quantize_model(tiny_model.language_model, policy, calibrate(tiny_model))
    scales = {
        p.name.rpartition(".")[2]: p.tensors
        for p in packed_linears(tiny_model.language_model, policy)
        if "k_scale" in p.tensors or "v_scale" in p.tensors
    }
    assert set(scales) == {"k_proj", "v_proj"}
    assert float(scales["k_proj"]["k_scale"]) > 0
