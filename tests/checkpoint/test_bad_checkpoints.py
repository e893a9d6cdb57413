"""Every way a BF16 checkpoint can be wrong is one clear fault, and all faults come at once."""

import json

import pytest
import torch

from checkpoint.config import read_config
from checkpoint.faults import BadInput
from checkpoint.files import TensorFiles, check_weights
from tests.editing import edit_json, edit_tensors, truncate

UP = "language_model.backbone.layers.1.mixer.up_proj.weight"


def faults_of(directory) -> str:
    with pytest.raises(BadInput) as caught:
        check_weights(read_config(directory))
    return str(caught.value)


def test_missing_directory(tmp_path):
    assert "no such directory" in faults_of(tmp_path / "nowhere")


def test_another_architecture(tiny_copy):
    edit_json(tiny_copy / "config.json", lambda c: c.update(architectures=["LlamaForCausalLM"]))
    assert "LlamaForCausalLM" in faults_of(tiny_copy)


def test_config_that_is_no_json(tiny_copy):
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
    assert "truncated or corrupt" in faults_of(tiny_copy)


def test_corrupt_header(tiny_copy):
    with (tiny_copy / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 64)
    assert "truncated or corrupt" in faults_of(tiny_copy)


def test_no_weights(tiny_copy):
    (tiny_copy / "model.safetensors").unlink()
    assert "holds neither" in faults_of(tiny_copy)


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
        tensors["mlp1.0.weight"] = tensors["mlp1.0.weight"].float()

    edit_tensors(tiny_copy, change)
    found = faults_of(tiny_copy)
    assert "tensor mlp1.1.weight is missing" in found
    assert "tensor mlp1.9.weight is not part of this architecture" in found
    assert f"tensor {UP} is BF16" in found
    assert "tensor mlp1.0.weight is F32" in found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tiny_copy, value):
    edit_tensors(tiny_copy, lambda tensors: tensors[UP].view(-1)[5:7].fill_(value))
    assert f"{UP}: holds 2 NaN or infinite values" in faults_of(tiny_copy)


def test_tokenizer_of_another_release(tiny_copy):
    from checkpoint.native import load_tokenizer

    edit_json(tiny_copy / "config.json", lambda c: c.update(img_context_token_id=5))
    with pytest.raises(BadInput, match=r"config\.json says 5"):
        load_tokenizer(read_config(tiny_copy))
    (tiny_copy / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"tokenizer\.json: no such file"):
        load_tokenizer(read_config(tiny_copy))


def test_native_load_refuses_what_transformers_would_initialise_at_random(tiny_copy):
    from checkpoint.native import load_model

    edit_tensors(tiny_copy, lambda tensors: tensors.pop(UP))
    with pytest.raises((BadInput, KeyError)):
        load_model(read_config(tiny_copy))


def test_native_load_keeps_every_weight(tiny_config, tiny_model):
    from checkpoint.native import module_name

    tensors = TensorFiles(tiny_config.directory)
    state = tiny_model.language_model.state_dict()
    for name in tensors:
        if name.startswith("language_model."):
            assert torch.equal(state[module_name(name)], tensors.read(name)), name
