"""ModelOpt is applied to the policy's layers and to nothing else, and a quantizer without a range
stops the run.
"""

import pytest
import torch

from checkpoint.faults import BadInput
from checkpoint.layout import language_model_linears
from quantize.policy import Rule, make_policy
from quantize.ptq import calibration_faults, packed_linears, quantize_model


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
    module = policy.family.native_module
    wanted = {f"{module(n)}.{q}_quantizer" for n in policy.quantized for q in ("weight", "input")}
    assert enabled(tiny_model) == wanted
    assert any(name.endswith("out_proj.input_quantizer") for name in wanted)


def test_a_weight_only_format_has_no_input_quantizer_enabled_and_no_input_scale(
    tiny_model, linears
):
    policy = make_policy([Rule(format="nvfp4_weight_only")], linears)
    quantize_model(tiny_model.language_model, policy, calibrate(tiny_model))
    module = policy.family.native_module
    assert enabled(tiny_model) == {f"{module(n)}.weight_quantizer" for n in policy.quantized}
    assert calibration_faults(tiny_model.language_model, policy) == []
    for packed in packed_linears(tiny_model.language_model, policy):
        assert set(packed.tensors) == {"weight", "weight_scale", "weight_scale_2"}


def test_q_k_and_v_of_a_weight_only_format_share_their_global_scale(tiny_model, linears):
    policy = make_policy([Rule(format="nvfp4_weight_only", kind="attention")], linears)
    quantize_model(tiny_model.language_model, policy, calibrate(tiny_model))
    scales = {}
    for packed in packed_linears(tiny_model.language_model, policy):
        scales[packed.name] = float(packed.tensors["weight_scale_2"])
    for names in policy.fused_groups():
        assert len(names) == 3
        assert len({scales[name] for name in names}) == 1
    assert len(set(scales.values())) > len(policy.fused_groups())


def test_a_weight_of_nan_stops_a_weight_only_run_by_name(tiny_model, linears):
    name = "language_model.backbone.layers.0.mixer.in_proj"
    policy = make_policy([Rule(format="nvfp4_weight_only")], linears)
    module = tiny_model.language_model.get_submodule(policy.family.native_module(name))
    module.weight.data[3, 4] = float("nan")
    with pytest.raises(BadInput, match=rf"{name}\.weight_quantizer: was given NaN"):
        quantize_model(tiny_model.language_model, policy, calibrate(tiny_model))


def test_upstream_trap_what_modelopt_prints_goes_to_the_log(tiny_model, linears, capsys, caplog):
    """`mtq.quantize` prints to standard output, where a command's result goes."""
    policy = make_policy([Rule(format="fp8", kind="attention")], linears)
    with caplog.at_level("DEBUG", logger="hybridquant"):
        quantize_model(tiny_model.language_model, policy, calibrate(tiny_model))
    assert capsys.readouterr().out == ""
    assert any("Inserted" in message for message in caplog.messages)


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
