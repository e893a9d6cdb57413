"""Every way a BF16 checkpoint can be wrong is one clear fault, and all faults come at once."""

import json
import shutil

import pytest
import torch

from checkpoint.faults import BadInput
from checkpoint.files import TensorFiles
from checkpoint.opened import check_finite, open_bf16, open_checkpoint
from checkpoint.other_weights import INDEX, SINGLE
from checkpoint.weight_files import weight_faults
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
    assert "is truncated: it has" in faults_of(tiny_copy)


def test_corrupt_header(tiny_copy):
    with (tiny_copy / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 64)
    assert "is not a safetensors file" in faults_of(tiny_copy)


def cut(directory):
    truncate(directory / SINGLE)


def write_no_header(directory):
    (directory / SINGLE).write_bytes(b"\xff" * 64)


def write_lfs_pointer(directory):
    (directory / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def empty(directory):
    (directory / SINGLE).write_bytes(b"")


def move_out(directory):
    (directory / SINGLE).rename(directory.parent / SINGLE)
    (directory / SINGLE).symlink_to(directory.parent / SINGLE)


def remove(directory):
    (directory / SINGLE).unlink()


def name_a_shard_that_is_not_there(directory):
    (directory / INDEX).write_text(json.dumps({"weight_map": {UP: "a.safetensors"}}))


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        write_no_header,
        write_lfs_pointer,
        empty,
        move_out,
        remove,
        name_a_shard_that_is_not_there,
    ],
)
def test_a_damaged_weight_file_is_told_in_the_same_words_at_the_first_look_and_later(
    tiny_copy, damage
):
    damage(tiny_copy)
    with pytest.raises(BadInput) as caught:
        TensorFiles(tiny_copy)
    (fault,) = caught.value.faults
    assert weight_faults(tiny_copy) == [fault]


def test_no_weights(tiny_copy):
    (tiny_copy / "model.safetensors").unlink()
    assert "contains neither model.safetensors.index.json nor model.safetensors" in faults_of(
        tiny_copy
    )


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("pytorch_model.bin", "safe_serialization=True"),
        ("model-Q4.gguf", "give the checkpoint that the GGUF file was made from"),
        ("adapter_model.safetensors", "it is an adapter: merge it"),
        ("model-00001-of-00002.safetensors", "copy model.safetensors.index.json as well"),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_weights_that_are_not_read_are_named_with_what_to_do(tiny_copy, file, remedy, has_config):
    (tiny_copy / "model.safetensors").rename(tiny_copy / file)
    if not has_config:
        (tiny_copy / "config.json").unlink()
    found = faults_of(tiny_copy)
    assert file in found
    assert remedy in found


def test_a_name_on_the_hub_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "hf download nvidia/Nemotron --local-dir DIR" in faults_of("nvidia/Nemotron")
    (tmp_path / "out").mkdir()
    assert "hf download" not in faults_of("out/nemotron")


def as_one_shard(directory):
    """Give a checkpoint of one file an index, under which the file has another name."""
    weight_map = dict.fromkeys(TensorFiles(directory), "model-00001-of-00001.safetensors")
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_weights_that_only_some_loaders_read_are_refused(tiny_copy):
    """transformers prefers model.safetensors to an index, and adds an adapter."""
    extra = tiny_copy / "extra.safetensors"
    shutil.copyfile(tiny_copy / "model.safetensors", extra)
    assert "extra.safetensors: lies beside model.safetensors, and loaders" in faults_of(tiny_copy)
    as_one_shard(tiny_copy)
    open_bf16(tiny_copy)  # no loader reads what an index does not name
    shutil.copyfile(extra, tiny_copy / "model.safetensors")
    assert "lies beside model.safetensors.index.json, and loaders" in faults_of(tiny_copy)
    (tiny_copy / "model.safetensors").rename(tiny_copy / "adapter_model.safetensors")
    assert "is an adapter beside the weights, and would be left out" in faults_of(tiny_copy)


def test_many_wrong_tensors_are_one_fault(tiny_copy):
    def rename(tensors):
        for name in list(tensors):
            if name.startswith("language_model.backbone"):
                tensors[name.replace("backbone", "model")] = tensors.pop(name)
        tensors["mlp1.0.weight"] = tensors["mlp1.0.weight"].char()

    edit_tensors(tiny_copy, rename)
    (line,) = faults_of(tiny_copy).splitlines()
    assert "60 tensors are missing, such as language_model.backbone.embeddings.weight" in line
    assert "60 tensors are not part of this architecture, such as language_model.model" in line
    assert "1 tensors differ: mlp1.0.weight is I8 [768], not BF16 [768]" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(force_image_size=250), "force_image_size is 250"),
        (lambda raw: raw.update(force_image_size=8), "multiples of 32 up to 256"),
        (lambda raw: raw.update(force_image_size=512), "multiples of 32 up to 256"),
        (lambda raw: raw.update(ps_version="v1"), "ps_version is 'v1'"),
        (lambda raw: raw["llm_config"].update(mlp_bias=True), "llm_config.mlp_bias is True"),
        (lambda raw: raw["llm_config"].update(mlp_hidden_act="silu"), "computed with 'relu2'"),
        (lambda raw: raw["llm_config"].update(n_groups=3), "n_groups is 3, for 64 heads"),
        (lambda raw: raw["llm_config"].update(num_key_value_heads=3), "is 3, for 4 heads"),
        (lambda raw: raw["vision_config"]["args"].update(teachers=[]), "teachers is empty"),
        (
            lambda raw: raw["vision_config"]["args"].update(num_attention_heads=5),
            "5 attention heads for a width of 192",
        ),
    ],
)
def test_values_that_fit_the_tensors_and_cannot_be_computed(tiny_copy, change, message):
    edit_json(tiny_copy / "config.json", change)
    assert message in faults_of(tiny_copy)


@pytest.mark.parametrize("key", ["layer_norm_epsilon", "bos_token_id"])
def test_a_value_that_transformers_refuses_is_a_fault(tiny_copy, key):
    from checkpoint.native import native_config

    edit_json(tiny_copy / "config.json", lambda raw: raw["llm_config"].update({key: "x"}))
    with pytest.raises(BadInput, match=rf"transformers' class .*'{key}'"):
        native_config(open_bf16(tiny_copy).config)


def test_a_token_without_a_row_of_the_embeddings(tiny_copy):
    def shrink(tensors):
        for name in ("backbone.embeddings", "lm_head"):
            weight = tensors[f"language_model.{name}.weight"]
            tensors[f"language_model.{name}.weight"] = weight[:983].clone()

    edit_tensors(tiny_copy, shrink)
    edit_json(tiny_copy / "config.json", lambda raw: raw["llm_config"].update(vocab_size=983))
    checkpoint = open_bf16(tiny_copy)
    with pytest.raises(BadInput, match="<video> has id 983, and the embeddings have 983 rows"):
        _ = checkpoint.tokenizer


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
