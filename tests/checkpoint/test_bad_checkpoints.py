"""Every way a BF16 checkpoint can be wrong is one clear fault, and all faults come at once."""

import json

import pytest
import torch

from checkpoint.faults import BadInput
from checkpoint.files import TensorFiles
from checkpoint.opened import check_finite, open_bf16, open_checkpoint
from tests.editing import edit_json, edit_tensors, truncate

UP = "language_model.backbone.layers.1.mixer.up_proj.weight"


def faults_of(directory) -> str:
    with pytest.raises(BadInput) as caught:
        check_finite(open_bf16(directory))
    return str(caught.value)


def test_missing_directory(tmp_path):
    assert "no such directory" in faults_of(tmp_path / "nowhere")


def test_another_architecture(tiny_copy):
    edit_json(tiny_copy / "config.json", lambda c: c.update(architectures=["LlamaForCausalLM"]))
    assert "LlamaForCausalLM" in faults_of(tiny_copy)


def test_config_that_is_not_json(tiny_copy):
    (tiny_copy / "config.json").write_text("{")
    assert "cannot be read as JSON" in faults_of(tiny_copy)


def test_all_missing_config_keys_are_named_at_once(tiny_copy):
    def drop(config):
        del config["patch_size"], config["llm_config"]["head_dim"]
        config["llm_config"]["hybrid_override_pattern"] = "M-E*"

    edit_json(tiny_copy / "config.json", drop)
    found = faults_of(tiny_copy)
    assert "patch_size" in found
    assert "llm_config.head_dim" in found
    assert "['E']" in found


def test_llm_config_without_dtype_is_refused_because_vllm_asserts_on_it(tiny_copy):
    edit_json(tiny_copy / "config.json", lambda c: c["llm_config"].pop("torch_dtype"))
    assert "torch_dtype is not bfloat16" in faults_of(tiny_copy)


def test_truncated_weights(tiny_copy):
    truncate(tiny_copy / "model.safetensors")
    assert "is truncated or not a safetensors file" in faults_of(tiny_copy)


def test_corrupt_header(tiny_copy):
    with (tiny_copy / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 64)
    assert "is truncated or not a safetensors file" in faults_of(tiny_copy)


def test_no_weights(tiny_copy):
    (tiny_copy / "model.safetensors").unlink()
    assert "contains neither model.safetensors.index.json nor model.safetensors" in faults_of(
        tiny_copy
    )


def test_index_that_names_a_missing_shard_and_a_wrong_place(tiny_copy):
    tensors = {name: "model.safetensors" for name in TensorFiles(tiny_copy)}
    tensors["mlp1.1.weight.extra"] = "model.safetensors"
    (tiny_copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": tensors}))
    assert "mlp1.1.weight.extra is in model.safetensors, where it is not" in faults_of(tiny_copy)
    tensors["mlp1.1.weight"] = "model-00002-of-00002.safetensors"
    (tiny_copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": tensors}))
    assert "no such file, though the index names it" in faults_of(tiny_copy)


def test_missing_extra_and_misshapen_tensors_are_named_at_once(tiny_copy):
    def change(tensors):
        tensors["mlp1.9.weight"] = tensors.pop("mlp1.1.weight")
        tensors[UP] = tensors[UP][:-1].clone()
        tensors["mlp1.0.weight"] = tensors["mlp1.0.weight"].char()

    edit_tensors(tiny_copy, change)
    found = faults_of(tiny_copy)
    assert "tensor mlp1.1.weight is missing" in found
    assert "tensor mlp1.9.weight is not part of this architecture" in found
    assert f"tensor {UP} is BF16" in found
    assert "tensor mlp1.0.weight is I8" in found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tiny_copy, value):
    edit_tensors(tiny_copy, lambda tensors: tensors[UP].view(-1)[5:7].fill_(value))
    assert f"{UP}: contains 2 NaN or infinite values" in faults_of(tiny_copy)


def test_all_tensors_that_are_not_finite_are_named_at_once(tiny_copy):
    def change(tensors):
        tensors[UP].view(-1)[5] = float("nan")
        tensors["mlp1.0.weight"][0] = float("inf")

    edit_tensors(tiny_copy, change)
    found = faults_of(tiny_copy)
    assert f"{UP}: contains 1 NaN" in found
    assert "mlp1.0.weight: contains 1 NaN" in found


def test_opening_reads_headers_only(tiny_copy):
    edit_tensors(tiny_copy, lambda tensors: tensors[UP].fill_(float("nan")))
    open_bf16(tiny_copy)


def test_a_quantized_checkpoint_is_opened_but_not_as_bf16(tiny_copy):
    edit_json(tiny_copy / "config.json", lambda c: c.update(quantization_config={}))
    assert open_checkpoint(tiny_copy).config.depth > 0
    assert "is quantized already (give the BF16 checkpoint)" in faults_of(tiny_copy)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("[]", "is a JSON list, not a JSON object"),
        ('{"metadata": {}}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map.a is not a file name"),
    ],
)
def test_an_index_that_is_not_one(tiny_copy, content, what):
    (tiny_copy / "model.safetensors.index.json").write_text(content)
    assert what in faults_of(tiny_copy)


def test_tokenizer_of_another_release(tiny_copy):
    edit_json(tiny_copy / "config.json", lambda c: c.update(img_context_token_id=5))
    checkpoint = open_bf16(tiny_copy)
    message = r"<image> has id 980, img_context_token_id in config\.json is 5"
    with pytest.raises(BadInput, match=message):
        _ = checkpoint.tokenizer


def test_a_checkpoint_without_a_tokenizer(tiny_copy):
    (tiny_copy / "tokenizer.json").unlink()
    checkpoint = open_bf16(tiny_copy)
    with pytest.raises(BadInput, match=r"tokenizer\.json: no such file"):
        _ = checkpoint.tokenizer


def test_native_load_refuses_what_transformers_would_initialize_at_random(tiny_copy):
    from checkpoint.native import load_model

    edit_tensors(tiny_copy, lambda tensors: tensors.pop(UP))
    checkpoint = open_checkpoint(tiny_copy)
    with pytest.raises(BadInput, match=rf"tensors missing: \['{UP}'\]"):
        load_model(checkpoint)


def test_native_load_keeps_every_weight(tiny_checkpoint, tiny_model):
    family = tiny_checkpoint.config.family
    state = tiny_model.language_model.state_dict()
    tensors = tiny_checkpoint.tensors
    compared = 0
    for name in tensors:
        if name.startswith(family.language_model):
            assert torch.equal(state[family.native_module(name)], tensors.read(name)), name
            compared += 1
    assert compared == len(state)
