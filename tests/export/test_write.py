"""The exported files: the bytes of ModelOpt's own exporter for what is quantized, the source's for
everything else.
"""

import json
import os
import shutil

import pytest
import torch
from modelopt.torch.export import export_hf_checkpoint

from checkpoint.atomic import check_output
from checkpoint.faults import BadInput
from checkpoint.files import TensorFiles
from checkpoint.layout import expected_tensors, language_model_linears, spec_bytes
from checkpoint.opened import open_checkpoint
from checkpoint.video import Video
from export.layout import output_specs, quantized_layout
from export.manifest import MANIFEST, Manifest, read_manifest
from export.write import open_writer, quantization_config, write_companions
from quantize.formats.registry import FORMATS
from quantize.layerwise import FinishedLayer, layer_policy
from quantize.policy import Rule, make_policy
from quantize.ptq import packed_linears, quantize_model
from tests.editing import raw_bytes

MANIFEST_OF_A_TEST = Manifest({}, {}, {}, {}, Video(pruning_rate=0.5))
LANGUAGE_MODEL = "language_model."


def quantized(model, checkpoint, rules, kv_cache=None):
    """Calibrate the model on random embeddings; NVFP4's ranges come without its CUDA-only fake
    quantization.
    """
    policy = make_policy(rules, checkpoint.linears, kv_cache)
    torch.manual_seed(0)
    embeds = torch.randn(1, 64, checkpoint.config.hidden_size, dtype=torch.bfloat16)
    quantize_model(
        model.language_model,
        policy,
        lambda: model.language_model(inputs_embeds=embeds, use_cache=False),
    )
    return policy


def layers_of(model, checkpoint, policy):
    for layer in range(checkpoint.config.depth):
        part = layer_policy(policy, checkpoint.config, layer)
        yield FinishedLayer(layer, tuple(packed_linears(model.language_model, part)))


def write(model, checkpoint, policy, output):
    with open_writer(checkpoint, policy, output) as writer:
        for layer in layers_of(model, checkpoint, policy):
            writer.put(layer.index, layer.tensors())
    write_companions(checkpoint, policy, output, MANIFEST_OF_A_TEST)
    return TensorFiles(output)


@pytest.mark.parametrize(
    ("format", "kv_cache"),
    [("fp8", None), ("fp8", "fp8"), ("nvfp4", None), ("nvfp4_weight_only", None)],
)
def test_scales_and_packed_bytes_equal_modelopts_exporter(
    tiny_model, tiny_checkpoint, tmp_path, format, kv_cache
):
    policy = quantized(tiny_model, tiny_checkpoint, [Rule(format=format)], kv_cache)
    ours = write(tiny_model, tiny_checkpoint, policy, tmp_path / "ours")
    export_hf_checkpoint(
        tiny_model.language_model, dtype=torch.bfloat16, export_dir=tmp_path / "theirs"
    )
    assert_same_language_model(ours, TensorFiles(tmp_path / "theirs"))
    section = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    for key in ("quant_algo", "quant_method", "kv_cache_scheme", "config_groups"):
        assert section.get(key) == theirs.get(key)


def assert_same_language_model(ours, theirs):
    language = [name for name in ours if name.startswith(LANGUAGE_MODEL)]
    assert {LANGUAGE_MODEL + name for name in theirs} == set(language)
    for name in language:
        a, b = ours.read(name), theirs.read(name.removeprefix(LANGUAGE_MODEL))
        assert a.dtype == b.dtype, name
        assert torch.equal(raw_bytes(a), raw_bytes(b)), name


def test_the_exporters_corrupted_ignore_entries_are_not_ours(tiny_model, tiny_checkpoint, tmp_path):
    """Upstream trap: ModelOpt 0.47 writes "lm_head.\\0backbone.pt_name_sentinel" for this model,
    excluding nothing.
    """
    policy = quantized(tiny_model, tiny_checkpoint, [Rule(format="fp8")])
    write(tiny_model, tiny_checkpoint, policy, tmp_path / "ours")
    for file in ("config.json", "hf_quant_config.json"):
        text = (tmp_path / "ours" / file).read_text()
        assert "\\u0000" not in text
        assert "sentinel" not in text


def test_unquantized_tensors_are_copied_bit_for_bit_and_names_are_kept(fp8, tiny, tiny_config):
    ours, source = TensorFiles(fp8), TensorFiles(tiny)
    scales = {name for name in ours if name.endswith("_scale")}
    assert set(ours) - scales == set(source)
    linears = {f"{linear.name}.weight" for linear in language_model_linears(tiny_config)}
    for name in set(source) - linears:
        assert torch.equal(raw_bytes(ours.read(name)), raw_bytes(source.read(name))), name


def test_config_keeps_every_key_and_gains_the_quantization_section(fp8, tiny):
    ours, source = (json.loads((folder / "config.json").read_text()) for folder in (fp8, tiny))
    section = ours.pop("quantization_config")
    assert ours == source
    assert section["quant_method"] == "modelopt"
    assert section["quant_algo"] == "FP8"
    legacy = json.loads((fp8 / "hf_quant_config.json").read_text())["quantization"]
    assert legacy["exclude_modules"] == section["ignore"]
    assert legacy["kv_cache_quant_algo"] is None


def test_the_models_files_are_carried_over_and_nothing_else(tiny_model, tiny_copy, tmp_path):
    before = {path.name for path in tiny_copy.iterdir()}
    (tiny_copy / "LICENSE").write_text("terms")
    (tiny_copy / "optimizer.pt").write_bytes(b"state")
    (tiny_copy / "checkpoint-500").mkdir()
    (tiny_copy / "checkpoint-500" / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tiny_copy)
    policy = quantized(tiny_model, checkpoint, [Rule(format="fp8")])
    write(tiny_model, checkpoint, policy, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    weights = {name for name in written if name.endswith(".safetensors")}
    ours = {"hf_quant_config.json", "model.safetensors.index.json", MANIFEST}
    assert written - weights == (before - {"model.safetensors"}) | ours | {"LICENSE"}


def test_shards_have_an_index_and_hold_every_tensor_once(tiny_model, tiny_checkpoint, tmp_path):
    policy = quantized(tiny_model, tiny_checkpoint, [Rule(format="fp8")])
    written = write(tiny_model, tiny_checkpoint, policy, tmp_path / "out")
    assert len(written.files) == tiny_checkpoint.config.depth + 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == spec_bytes(written.specs)
    assert index["weight_map"] == written.location
    assert written.specs == output_specs(tiny_checkpoint, policy)


def test_what_an_earlier_run_has_written_is_kept(tiny_model, tiny_checkpoint, tmp_path):
    policy = quantized(tiny_model, tiny_checkpoint, [Rule(format="fp8")])
    write(tiny_model, tiny_checkpoint, policy, tmp_path / "out")
    outside = tmp_path / "out" / TensorFiles(tmp_path / "out").location["mlp1.1.weight"]
    before = outside.stat().st_mtime_ns
    with open_writer(tiny_checkpoint, policy, tmp_path / "out"):
        pass
    assert outside.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("format", "gigabytes"), [("fp8", 15.40), ("nvfp4", 10.60), ("nvfp4_weight_only", 10.60)]
)
def test_the_published_12b_has_the_size_of_the_release(full12b, format, gigabytes):
    """Repository sizes of the release (published.md): FP8 15.40 GB, NVFP4 10.62 GB."""
    policy = make_policy([Rule(format=format)], language_model_linears(full12b))
    specs = quantized_layout(full12b, policy.quantized, kv_scales=False)
    assert spec_bytes(specs) / 1e9 == pytest.approx(gigabytes, abs=0.02)


def test_mixed_precision_lists_its_layers(full12b):
    rules = [
        Rule(format="nvfp4"),
        Rule(format="fp8", kind="attention"),
        Rule(format="nvfp4_weight_only", name="down_proj"),
        Rule(format="bf16", layers=(0,)),
    ]
    policy = make_policy(rules, language_model_linears(full12b))
    section = quantization_config(policy)["quantization"]
    layers = section["quantized_layers"]
    at = "language_model.backbone.layers.{}.mixer.{}".format
    assert section["quant_algo"] == "MIXED_PRECISION"
    assert layers[at(7, "q_proj")] == {"quant_algo": "FP8"}
    assert layers[at(1, "up_proj")] == {"quant_algo": "NVFP4", "group_size": 16}
    assert layers[at(1, "down_proj")] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert at(0, "in_proj") not in layers


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_config_of_each_format_names_it_with_its_group_size(full12b, name):
    policy = make_policy([Rule(format=name)], language_model_linears(full12b))
    section = quantization_config(policy)["quantization"]
    assert section["quant_algo"] == FORMATS[name].algo
    assert section.get("group_size") == FORMATS[name].group_size


def test_an_existing_output_is_refused(tmp_path):
    with pytest.raises(BadInput, match="exists already"):
        check_output(tmp_path, 1)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(BadInput, match="free some space"):
        check_output(tmp_path / "deep" / "out", free)
    assert not (tmp_path / "deep").exists()


def test_a_failure_in_the_middle_leaves_whole_files_only(tiny_model, tiny_checkpoint, tmp_path):
    policy = quantized(tiny_model, tiny_checkpoint, [Rule(format="fp8")])
    layers = list(layers_of(tiny_model, tiny_checkpoint, policy))

    def interrupted():
        with open_writer(tiny_checkpoint, policy, tmp_path / "out") as writer:
            for layer in layers[:5]:
                writer.put(layer.index, layer.tensors())
            raise OSError(28, os.strerror(28), str(tmp_path / "out"))

    with pytest.raises(OSError, match="No space left"):
        interrupted()
    whole = write(tiny_model, tiny_checkpoint, policy, tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".*"))
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (whole.directory / file.name).read_bytes()


def test_the_manifest_tells_the_server_its_pruning_rate(tiny_model, tiny_checkpoint, tmp_path):
    policy = quantized(tiny_model, tiny_checkpoint, [Rule(format="fp8")])
    write(tiny_model, tiny_checkpoint, policy, tmp_path / "out")
    assert read_manifest(tmp_path / "out").video.pruning_rate == 0.5


def test_an_optional_tensor_of_the_source_is_carried_over(tiny_checkpoint, tmp_path, tiny_copy):
    from tests.editing import edit_tensors

    (name, *_) = tiny_checkpoint.config.family.optional_tensors
    edit_tensors(tiny_copy, lambda tensors: tensors.update({name: torch.ones(3, 1, 1)}))
    policy = make_policy([Rule(format="fp8")], tiny_checkpoint.linears)
    assert name in output_specs(open_checkpoint(tiny_copy), policy)
    assert name not in output_specs(tiny_checkpoint, policy)
    assert name not in expected_tensors(tiny_checkpoint.config)
