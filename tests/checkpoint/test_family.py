"""A second model family is one value: a renamed copy of the tiny checkpoint goes all the way.

Nothing outside `checkpoint.family` may know a name of the first family, or a test here fails.
"""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from accuracy.agreement import compare, final_states
from calibrate.prompts import build_prompt
from calibrate.samples import Sample
from checkpoint.config import read_config
from checkpoint.family import (
    NEMOTRON_NANO_VL_V2,
    find_family,
    known_architectures,
    register_family,
    unregister_family,
)
from checkpoint.faults import BadInput
from checkpoint.layers import layer_specs, outside_layers
from checkpoint.layout import expected_tensors, spec_bytes
from checkpoint.native import load_final_norm, load_model
from checkpoint.opened import Checkpoint, check_finite, open_bf16
from checkpoint.video import Video
from tests.editing import edit_json
from tiny.tasks import items

PREFIXES = {
    "language_model.backbone.": "text_part.decoder.",
    "language_model.": "text_part.",
    "vision_model.radio_model.": "eye.tower.",
    "mlp1.": "bridge.",
}
"""The prefixes of the first family, and those of the second; the longer ones first."""

RENAMED = dataclasses.replace(
    NEMOTRON_NANO_VL_V2,
    architecture="Renamed_VL",
    language_model="text_part.",
    backbone="text_part.decoder.",
    vision="eye.tower.",
    projector="bridge.",
    never_quantized=(
        "text_part.lm_head",
        "*lm_head*",
        "text_part.decoder.embeddings",
        "*.mixer.conv1d",
        "bridge*",
        "eye*",
    ),
    optional_tensors=("eye.tower.input_conditioner.norm_mean",),
    released_names={new: old for old, new in PREFIXES.items()},
    vllm_renames=(("text_part.decoder", "text_part.model"), (".embeddings", ".embed_tokens")),
)


def renamed(name: str) -> str:
    for old, new in PREFIXES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise AssertionError(f"{name} has none of the known prefixes")


@pytest.fixture(scope="module")
def directory(tiny, tmp_path_factory):
    """The tiny checkpoint under the names of the second family, which is known meanwhile."""
    target = tmp_path_factory.mktemp("family") / "renamed"
    shutil.copytree(tiny, target)
    tensors = {}
    for name, tensor in load_file(tiny / "model.safetensors").items():
        tensors[renamed(name)] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    edit_json(target / "config.json", lambda c: c.update(architectures=[RENAMED.architecture]))
    register_family(RENAMED)
    yield target
    unregister_family(RENAMED)


@pytest.fixture(scope="module")
def checkpoint(directory) -> Checkpoint:
    return open_bf16(directory)


def test_a_family_is_known_between_registering_and_unregistering():
    family = dataclasses.replace(RENAMED, architecture="Another_VL")
    register_family(family)
    assert find_family(["Another_VL"]) is family
    assert "Another_VL" in known_architectures()
    unregister_family(family)
    assert find_family(["Another_VL"]) is None
    assert known_architectures()[0] == NEMOTRON_NANO_VL_V2.architecture


def test_an_unknown_architecture_is_answered_with_those_that_are_known(tiny_copy):
    edit_json(tiny_copy / "config.json", lambda c: c.update(architectures=["Unheard_VL"]))
    with pytest.raises(BadInput, match=r"Unheard_VL.*expected one of: NemotronH_Nano_VL_V2"):
        read_config(tiny_copy)


@pytest.mark.parametrize("architectures", [None, "NemotronH_Nano_VL_V2", [], ["a", "b"], [None]])
def test_architectures_that_are_not_a_list_of_one_name_are_no_family(architectures):
    assert find_family(architectures) is None


def test_the_family_is_found_by_the_architecture(checkpoint):
    assert checkpoint.config.family is RENAMED


def test_its_tensors_are_those_of_the_config_in_the_same_order(checkpoint, tiny_checkpoint):
    check_finite(checkpoint)
    assert list(checkpoint.layout) == [renamed(name) for name in tiny_checkpoint.layout]
    assert dict(checkpoint.tensors.specs) == expected_tensors(checkpoint.config)


def test_a_tensor_of_the_first_family_is_not_part_of_the_second(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors["mlp1.1.weight"] = tensors.pop("bridge.1.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput) as caught:
        open_bf16(copy)
    assert "tensor bridge.1.weight is missing" in str(caught.value)
    assert "tensor mlp1.1.weight is not part of this architecture" in str(caught.value)


def test_an_optional_tensor_may_be_there(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors["eye.tower.input_conditioner.norm_mean"] = torch.zeros(3, 1, 1).bfloat16()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    open_bf16(copy)


def test_layers_and_the_rest_add_up_to_the_whole(checkpoint):
    depth = checkpoint.config.depth
    layers = sum(spec_bytes(layer_specs(checkpoint, layer)) for layer in range(depth))
    assert layers + outside_layers(checkpoint) == spec_bytes(checkpoint.layout)


def test_every_name_has_one_place_in_the_native_model(checkpoint):
    state = load_model(checkpoint).language_model.state_dict()
    names = [name for name in checkpoint.layout if name.startswith(RENAMED.language_model)]
    assert {RENAMED.native_module(name) for name in names} == state.keys()
    for name in names:
        assert RENAMED.checkpoint_name(RENAMED.native_module(name)) == name
        assert torch.equal(state[RENAMED.native_module(name)], checkpoint.tensors.read(name)), name


def test_a_linear_has_vllms_name_fused_and_not(checkpoint):
    linear = "text_part.decoder.layers.7.mixer.q_proj"
    assert RENAMED.vllm_module(linear) == "text_part.model.layers.7.mixer.q_proj"
    assert RENAMED.fused_module(linear) == "text_part.model.layers.7.mixer.qkv_proj"
    assert RENAMED.fused_parts("k_proj") == ("q_proj", "k_proj", "v_proj")
    assert RENAMED.fused_parts("up_proj") == ()


@torch.no_grad()
def test_it_loads_with_the_same_logits_as_the_first(checkpoint, tiny_checkpoint):
    ids = torch.arange(20, 90)[None]
    ours = load_model(checkpoint).language_model(ids, use_cache=False).logits
    theirs = load_model(tiny_checkpoint).language_model(ids, use_cache=False).logits
    assert torch.equal(ours, theirs)


def test_a_clip_and_a_text_give_the_same_states_as_the_first(checkpoint, tiny_checkpoint):
    samples = items("video_event", count=1)
    samples.append(Sample("text", [{"role": "user", "content": "Which word comes first?"}], "test"))
    found = []
    for opened in (checkpoint, tiny_checkpoint):
        prompts = []
        for sample in samples:
            prompts.append(build_prompt(sample, opened.config, opened.tokenizer, Video()))
        model = load_model(opened)
        found.append(final_states(model, prompts, opened.config, "states"))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.token_ids, theirs.token_ids)
        assert torch.equal(ours.hidden, theirs.hidden)


@torch.no_grad()
def test_layers_one_by_one_give_the_whole_models_states(checkpoint):
    from calibrate.layerwise import runner
    from checkpoint.layers import read_layers

    hidden = torch.randn(1, 30, checkpoint.config.hidden_size, dtype=torch.bfloat16)
    whole = load_model(checkpoint).language_model.model
    expected = whole(inputs_embeds=hidden, use_cache=False).last_hidden_state
    for _, layer in read_layers(checkpoint, "cpu", checkpoint.tensors.read):
        hidden = runner(layer)(hidden)
    assert torch.equal(load_final_norm(checkpoint, "cpu")(hidden), expected)


@pytest.fixture(scope="module", params=["whole", "layers"])
def export(request, directory, tmp_path_factory):
    """Exit status and output of the flow on the second family, with a quantized KV cache."""
    from pipeline.run import run
    from recipes.loading import SHIPPED, load_recipe

    output = tmp_path_factory.mktemp("export") / request.param
    overrides = [
        "calibrate.samples=4",
        "accuracy.samples=2",
        "accuracy.tasks=null",
        "quantize.kv_cache=fp8",
        f"quantize.memory={request.param}",
        f"model={directory}",
        f"output={output}",
    ]
    return run(load_recipe(SHIPPED / "tiny/fp8.yaml", overrides)), output


def test_the_flow_quantizes_verifies_and_measures_it(export):
    status, output = export
    assert status == 0
    manifest = json.loads((output / "hybridquant.json").read_text())
    assert manifest["gate"]["passed"] is True


def test_what_is_written_has_its_names_only(export, checkpoint):
    from checkpoint.opened import open_checkpoint

    _, output = export
    exported = open_checkpoint(output)
    assert exported.config.family is RENAMED
    names = list(exported.tensors)
    assert names
    for prefix in PREFIXES:
        assert not [name for name in names if name.startswith(prefix)]
    for linear in checkpoint.linears:
        assert exported.tensors.specs[f"{linear.name}.weight"].dtype == "F8_E4M3"
    excluded = json.loads((output / "hf_quant_config.json").read_text())["quantization"]
    assert set(RENAMED.never_quantized) <= set(excluded["exclude_modules"])


def test_it_is_read_back_close_to_bf16(export, checkpoint):
    from checkpoint.opened import open_checkpoint
    from export.load import load_exported

    prompts = []
    for sample in items("document", count=3):
        prompts.append(build_prompt(sample, checkpoint.config, checkpoint.tokenizer, Video()))
    bf16 = load_model(checkpoint)
    quantized = load_exported(open_checkpoint(export[1]))
    reference = final_states(bf16, prompts, checkpoint.config, "BF16")
    variant = final_states(quantized, prompts, checkpoint.config, "quantized")
    head = bf16.language_model.lm_head
    agreement = compare(reference, variant, head, checkpoint.config.image_token_id)["all"]
    assert 0 < agreement.kl < 0.02
