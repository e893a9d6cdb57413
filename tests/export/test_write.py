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
from checkpoint.files import TensorFiles, check_weights
from checkpoint.layout import LANGUAGE_MODEL, language_model_linears, spec_bytes
from export.manifest import MANIFEST, Manifest, read_manifest
from export.write import output_specs, quantization_config, write_checkpoint
from quantize.policy import Rule, make_policy
from quantize.ptq import packed_linears, quantize_model
from tests.editing import raw_bytes

MANIFEST_OF_A_TEST = Manifest({}, {}, {}, {}, {"video_pruning_rate": 0.5})


def quantized(model, config, rules, kv_cache=None):
    """Calibrate the model on random embeddings; NVFP4's ranges come without its CUDA-only fake
    quantization.
    """
    policy = make_policy(rules, language_model_linears(config), kv_cache)
    torch.manual_seed(0)
    embeds = torch.randn(1, 64, config.text["hidden_size"], dtype=torch.bfloat16)
    quantize_model(
        model.language_model,
        policy,
        lambda: model.language_model(inputs_embeds=embeds, use_cache=False),
    )
    return policy


def write(model, config, policy, output, **options):
    packed = packed_linears(model.language_model, policy)
    write_checkpoint(
        config, check_weights(config), policy, packed, output, MANIFEST_OF_A_TEST, **options
    )
    return TensorFiles(output)


@pytest.mark.parametrize(("format", "kv_cache"), [("fp8", None), ("fp8", "fp8"), ("nvfp4", None)])
def test_scales_and_packed_bytes_equal_modelopts_exporter(
    tiny_model, tiny_config, tmp_path, format, kv_cache
):
    policy = quantized(tiny_model, tiny_config, [Rule(format)], kv_cache)
    ours = write(tiny_model, tiny_config, policy, tmp_path / "ours")
    export_hf_checkpoint(
        tiny_model.language_model, dtype=torch.bfloat16, export_dir=tmp_path / "theirs"
    )
    assert_same_language_model(ours, TensorFiles(tmp_path / "theirs"))


def assert_same_language_model(ours, theirs):
    language = [name for name in ours if name.startswith(LANGUAGE_MODEL)]
    assert {LANGUAGE_MODEL + name for name in theirs} == set(language)
    for name in language:
        a, b = ours.read(name), theirs.read(name.removeprefix(LANGUAGE_MODEL))
        assert a.dtype == b.dtype, name
        assert torch.equal(raw_bytes(a), raw_bytes(b)), name


def test_the_exporters_corrupted_ignore_entries_are_not_ours(tiny_model, tiny_config, tmp_path):
    """Upstream trap: ModelOpt 0.47 writes "lm_head.\\0backbone.pt_name_sentinel" for this model,
    excluding nothing.
    """
    policy = quantized(tiny_model, tiny_config, [Rule("fp8")])
    write(tiny_model, tiny_config, policy, tmp_path / "ours")
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


def test_every_other_file_of_the_source_is_carried_over(
    tiny_model, tiny_copy, tiny_config, tmp_path
):
    from checkpoint.config import read_config

    (tiny_copy / "LICENSE").write_text("terms")
    (tiny_copy / "assets").mkdir()
    (tiny_copy / "assets" / "modeling.py").write_text("pass")
    config = read_config(tiny_copy)
    policy = quantized(tiny_model, config, [Rule("fp8")])
    write(tiny_model, config, policy, tmp_path / "out")
    expected = {str(p.relative_to(tiny_copy)) for p in tiny_copy.rglob("*") if p.is_file()}
    written = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert written == expected | {"hf_quant_config.json", MANIFEST}
    assert (tmp_path / "out" / "assets" / "modeling.py").read_text() == "pass"


def test_shards_have_an_index_and_hold_the_same_tensors(tiny_model, tiny_config, tmp_path):
    policy = quantized(tiny_model, tiny_config, [Rule("fp8")])
    whole = write(tiny_model, tiny_config, policy, tmp_path / "whole")
    sharded = write(tiny_model, tiny_config, policy, tmp_path / "sharded", shard_bytes=2_000_000)
    assert len(sharded.files) > 2
    assert all((tmp_path / "sharded" / file).stat().st_size < 2_100_000 for file in sharded.files)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == spec_bytes(sharded.specs)
    assert set(whole) == set(sharded)
    assert all(torch.equal(raw_bytes(whole.read(n)), raw_bytes(sharded.read(n))) for n in whole)


def test_the_published_12b_fp8_is_15_4_gb(full12b):
    """Repository sizes of the release (published.md): FP8 15.40 GB, NVFP4 10.62 GB."""
    from checkpoint.layout import expected_tensors

    source = expected_tensors(full12b)
    for format, gigabytes in (("fp8", 15.40), ("nvfp4", 10.60)):
        policy = make_policy([Rule(format)], language_model_linears(full12b))
        assert spec_bytes(output_specs(full12b, policy, source)) / 1e9 == pytest.approx(
            gigabytes, abs=0.02
        )


def test_mixed_precision_lists_its_layers(full12b):
    rules = [Rule("nvfp4"), Rule("fp8", kind="attention"), Rule("bf16", layers=(0,))]
    section = quantization_config(make_policy(rules, language_model_linears(full12b)))[
        "quantization"
    ]
    layers = section["quantized_layers"]
    assert section["quant_algo"] == "MIXED_PRECISION"
    assert layers["language_model.backbone.layers.7.mixer.q_proj"] == {"quant_algo": "FP8"}
    assert layers["language_model.backbone.layers.1.mixer.up_proj"] == {
        "quant_algo": "NVFP4",
        "group_size": 16,
    }
    assert "language_model.backbone.layers.0.mixer.in_proj" not in layers


def test_an_existing_output_is_refused(tmp_path):
    with pytest.raises(BadInput, match="exists already"):
        check_output(tmp_path, 1)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(BadInput, match="free some space"):
        check_output(tmp_path / "deep" / "out", free)
    assert not (tmp_path / "deep").exists()


def test_a_failure_in_the_middle_leaves_nothing(tiny_model, tiny_config, tmp_path):
    policy = quantized(tiny_model, tiny_config, [Rule("fp8")])

    def dying():
        yield from list(packed_linears(tiny_model.language_model, policy))[:5]
        raise OSError(28, os.strerror(28), str(tmp_path / "out"))

    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(
            tiny_config,
            check_weights(tiny_config),
            policy,
            dying(),
            tmp_path / "out",
            MANIFEST_OF_A_TEST,
        )
    assert os.listdir(tmp_path) == []


def test_the_manifest_tells_the_server_its_pruning_rate(tiny_model, tiny_config, tmp_path):
    policy = quantized(tiny_model, tiny_config, [Rule("fp8")])
    write(tiny_model, tiny_config, policy, tmp_path / "out")
    assert read_manifest(tmp_path / "out").serve == {"video_pruning_rate": 0.5}
