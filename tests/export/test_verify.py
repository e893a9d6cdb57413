"""The verifier sees each kind of damage, and a sound directory has no faults. Every test damages
one thing, in a directory whose manifest records no SHA-256: with it, any change would be seen.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint.config import read_config
from checkpoint.faults import BadInput, Fault
from checkpoint.files import TensorFiles
from checkpoint.layout import language_model_linears
from export.layout import linear_formats
from export.manifest import MANIFEST
from export.verify import show_faults, verify
from tests.editing import edit_json, edit_tensors, truncate
from tests.forked import run_forked

ROOT = Path(__file__).parents[2]
FIX_SECTION = "fix quantization_config, or export again"

LAYER = "language_model.backbone.layers.{}.mixer.{}"
IN_PROJ = LAYER.format(0, "in_proj")


@pytest.fixture
def fp8_copy(fp8, tmp_path) -> Path:
    """A copy of the FP8 export that a test may change, without recorded digests."""
    return copy_without_digests(fp8, tmp_path / "fp8")


def copy_without_digests(directory, target) -> Path:
    shutil.copytree(directory, target)
    edit_json(target / MANIFEST, lambda manifest: manifest.pop("files"))
    return target


@pytest.fixture
def attention(tiny_config) -> str:
    return f"language_model.backbone.layers.{tiny_config.pattern.index('*')}.mixer"


@pytest.fixture(scope="module")
def mixed_export(nvfp4_export) -> Path:
    """An export with NVFP4, attention in FP8 and MLPs in BF16; do not change it, take `mixed`."""
    rules = "{format: nvfp4}, {format: fp8, kind: attention}, {format: bf16, kind: mlp}"
    return nvfp4_export(f"quantize.layers=[{rules}]")


@pytest.fixture
def mixed(mixed_export, tmp_path) -> Path:
    return copy_without_digests(mixed_export, tmp_path / "mixed")


def messages(directory, source=None) -> str:
    return "\n".join(str(fault) for fault in verify(directory, source))


def section(config):
    return config["quantization_config"]


def edit_both_lists(directory, change):
    edit_json(directory / "config.json", lambda c: change(section(c)["ignore"]))
    edit_json(
        directory / "hf_quant_config.json", lambda c: change(c["quantization"]["exclude_modules"])
    )


def test_a_sound_directory_has_no_faults(fp8, tiny):
    assert verify(fp8, tiny) == []


COMPANIONS = [
    ("tokenizer.json", "{}", "is an empty JSON object"),
    ("tokenizer.json", '{"a": [', "cannot be read as JSON"),
    ("tokenizer.json", '{"a": 1}', "is not a tokenizer"),
    ("tokenizer_config.json", "", "is empty"),
    ("tokenizer_config.json", "version https://git-lfs", "is only a Git LFS pointer"),
    ("generation_config.json", "[", "cannot be read as JSON"),
    ("chat_template.jinja", "{% if %}", "is not a chat template"),
    ("configuration.py", "class :", "is not Python"),
]


@pytest.mark.parametrize(("name", "content", "what"), COMPANIONS)
def test_a_broken_file_beside_the_weights_is_one_fault(fp8_copy, tiny, name, content, what):
    (fp8_copy / name).write_text(content)
    for source in (None, tiny):
        (fault,) = verify(fp8_copy, source)
        assert fault.where == str(fp8_copy / name)
        assert what in fault.what


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_beside_the_weights_is_one_fault(fp8_copy, tiny, name):
    (fp8_copy / name).unlink()
    for source in (None, tiny):
        found = [fault for fault in verify(fp8_copy, source) if fault.where.endswith(name)]
        assert len(found) == 1
        assert "no such file" in found[0].what


def test_files_that_are_sound_but_not_the_sources_are_faults(fp8_copy, tiny):
    edit_json(fp8_copy / "tokenizer_config.json", lambda raw: raw.update(model_max_length=7))
    with (fp8_copy / "configuration.py").open("a") as file:
        file.write("# changed\n")
    (fp8_copy / "generation_config.json").unlink()
    (fp8_copy / "chat_template.jinja").write_text("{{ messages }}")
    (fp8_copy / "added_tokens.json").write_text('{"<a>": 7}')
    (fp8_copy / "README.md").write_text("Quantized.")
    (fault,) = verify(fp8_copy)  # a template without the assistant's turn is not sound either
    assert fault.where == str(fp8_copy / "chat_template.jinja")
    found = {Path(fault.where).name: fault.what for fault in verify(fp8_copy, tiny)}
    assert found == {
        "tokenizer_config.json": f"differs from that of {tiny} in model_max_length",
        "configuration.py": f"differs from that of {tiny}",
        "generation_config.json": f"no such file, unlike in {tiny}",
        "chat_template.jinja": f"differs from that of {tiny}",
        "added_tokens.json": "belongs neither to the source nor to what hybridquant.json records",
    }


def test_missing_tensor(fp8_copy):
    edit_tensors(fp8_copy, lambda t: t.pop("mlp1.1.weight"))
    assert "tensor mlp1.1.weight is missing" in messages(fp8_copy)


def test_missing_scale(fp8_copy):
    edit_tensors(fp8_copy, lambda t: t.pop(f"{IN_PROJ}.input_scale"))
    assert f"tensor {IN_PROJ}.input_scale is missing" in messages(fp8_copy)


def test_extra_tensor(fp8_copy):
    edit_tensors(fp8_copy, lambda t: t.update({"mlp1.1.weight_scale": torch.ones(())}))
    assert "tensor mlp1.1.weight_scale is not part of" in messages(fp8_copy)


def test_wrong_shape_and_dtype(fp8_copy):
    def change(tensors):
        tensors[f"{IN_PROJ}.weight_scale"] = torch.ones(1)
        tensors["mlp1.0.weight"] = tensors["mlp1.0.weight"].half()

    edit_tensors(fp8_copy, change)
    found = messages(fp8_copy)
    assert f"{IN_PROJ}.weight_scale is F32 [1], not F32 []" in found
    assert "mlp1.0.weight is F16" in found


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_and_positive(fp8_copy, value):
    edit_tensors(fp8_copy, lambda t: t[f"{IN_PROJ}.input_scale"].fill_(value))
    assert f"{IN_PROJ}.input_scale: has 1 values that are zero, negative or not finite" in messages(
        fp8_copy
    )


def test_nan_in_a_packed_weight(fp8_copy):
    edit_tensors(fp8_copy, lambda t: t[f"{IN_PROJ}.weight"].view(torch.uint8)[0].fill_(0x7F))
    assert f"{IN_PROJ}.weight: contains NaN" in messages(fp8_copy)


def test_nan_in_an_unquantized_weight(fp8_copy):
    edit_tensors(fp8_copy, lambda t: t["mlp1.1.weight"][0].fill_(float("nan")))
    assert "mlp1.1.weight: contains NaN" in messages(fp8_copy)


def test_qkv_inputs_that_differ_cannot_be_fused(fp8_copy, attention):
    edit_tensors(fp8_copy, lambda t: t[f"{attention}.k_proj.input_scale"].mul_(2))
    assert f"{attention} input_scale: differs" in messages(fp8_copy)


def test_a_quantized_linear_that_the_list_excludes(fp8_copy):
    """Upstream trap: a glob such as language_model* makes vLLM take the whole language model for
    BF16.
    """
    edit_both_lists(fp8_copy, lambda entries: entries.append("language_model*"))
    assert f"{IN_PROJ}: is quantized, but vLLM's exclude rule leaves it out" in messages(fp8_copy)


def test_a_linear_of_a_mixed_export_that_the_list_excludes(mixed):
    """Upstream trap: vLLM consults the exclude list first, also where quantized_layers names the
    linear's format.
    """
    assert messages(mixed) == ""
    edit_both_lists(mixed, lambda entries: entries.append("language_model*"))
    found = messages(mixed)
    assert f"{IN_PROJ}: is quantized, but vLLM's exclude rule leaves it out" in found
    assert f"quantized_layers names {IN_PROJ}, which vLLM's exclude rule leaves out" in found


@pytest.mark.parametrize("module", ["lm_head", "conv1d"])
def test_an_unquantized_module_that_the_list_does_not_exclude(fp8_copy, module):
    def change(entries):
        entries[:] = [entry for entry in entries if module not in entry]

    edit_both_lists(fp8_copy, change)
    assert f"{module}: has no scales, but vLLM takes it for quantized" in messages(fp8_copy)


def test_a_corrupted_exclude_list(fp8_copy):
    """Upstream trap: ModelOpt 0.47's entries for this model end in a NUL and a sentinel."""

    def corrupt(entries):
        entries[:] = [f"{entry}.\0backbone.pt_name_sentinel" for entry in entries]

    edit_both_lists(fp8_copy, corrupt)
    found = messages(fp8_copy)
    assert "is not a module name" in found
    assert "lm_head: has no scales, but vLLM takes it for quantized" in found


def test_the_two_config_files_must_agree(fp8_copy):
    edit_json(
        fp8_copy / "hf_quant_config.json", lambda c: c["quantization"]["exclude_modules"].pop()
    )
    assert "exclude_modules differs from ignore" in messages(fp8_copy)


def test_a_directory_that_would_serve_as_bf16(fp8_copy, tiny):
    edit_json(fp8_copy / "config.json", lambda c: c.pop("quantization_config"))
    assert "has no quantization_config, so vLLM serves BF16" in messages(fp8_copy)
    assert "has no quantization_config, so vLLM serves BF16" in messages(tiny)


def test_null_quant_algo(fp8_copy):
    edit_json(fp8_copy / "config.json", lambda c: section(c).update(quant_algo=None))
    assert "quant_algo is None" in messages(fp8_copy)


def test_an_algorithm_the_tensors_do_not_have(fp8_copy, tiny_config):
    edit_json(fp8_copy / "config.json", lambda c: section(c).update(quant_algo="NVFP4"))
    found = messages(fp8_copy)
    assert f"{IN_PROJ}: is FP8, config.json says NVFP4" in found
    # One fault for each linear, and two of hf_quant_config.json: algorithm and group size.
    assert len(found.splitlines()) == len(language_model_linears(tiny_config)) + 2


@pytest.mark.parametrize("algo", ["W4A8_NVFP4_FP8", "fp9", 8])
def test_an_unknown_algorithm_is_one_fault_that_names_the_known_ones(fp8_copy, algo):
    for file, change in (
        ("config.json", lambda c: section(c).update(quant_algo=algo)),
        ("hf_quant_config.json", lambda c: c["quantization"].update(quant_algo=algo)),
    ):
        edit_json(fp8_copy / file, change)
    fault, _ = verify(fp8_copy)  # the other names config_groups, which no longer fit
    known = "FP8, NVFP4, W4A16_NVFP4, MIXED_PRECISION"
    assert fault.what == f"quant_algo is {algo}, not one of {known}"
    with pytest.raises(BadInput, match=r"quant_algo of .* not one of FP8"):
        linear_formats(read_config(fp8_copy))


def test_the_format_is_read_from_the_config_and_never_from_dtypes(fp8, nvfp4_weight_only, tiny):
    def used(directory):
        return set(linear_formats(read_config(directory)).values())

    assert used(fp8) == {"fp8"}
    assert used(nvfp4_weight_only) == {"nvfp4_weight_only"}
    assert used(tiny) == set()


def test_an_algorithm_in_lower_case_is_read_as_vllm_reads_it(fp8_copy):
    edit_json(fp8_copy / "config.json", lambda c: section(c).update(quant_algo="fp8"))
    assert set(linear_formats(read_config(fp8_copy)).values()) == {"fp8"}


def change_layers(directory, change):
    edit_json(directory / "config.json", lambda c: change(section(c)["quantized_layers"]))


def test_a_linear_that_quantized_layers_gives_another_format(mixed, attention):
    def change(layers):
        layers[IN_PROJ]["quant_algo"] = "W4A16_NVFP4"
        del layers[f"{attention}.o_proj"]

    change_layers(mixed, change)
    found = messages(mixed)
    assert f"{IN_PROJ}: is NVFP4, config.json says W4A16_NVFP4" in found
    assert f"{attention}.o_proj: is FP8, config.json says BF16" in found


def test_a_linear_that_quantized_layers_names_and_has_no_scales(mixed, tiny_config):
    mlp = LAYER.format(tiny_config.pattern.index("-"), "up_proj")
    change_layers(mixed, lambda layers: layers.update({mlp: {"quant_algo": "FP8"}}))
    assert f"quantized_layers names {mlp}, which vLLM's exclude rule leaves out" in messages(mixed)
    edit_both_lists(mixed, lambda entries: entries.remove(mlp))
    assert f"{mlp}: has no scales, but vLLM takes it for quantized" in messages(mixed)


def test_a_format_that_differs_within_a_fused_layer(mixed, attention):
    change_layers(
        mixed, lambda layers: layers.update({f"{attention}.k_proj": {"quant_algo": "NVFP4"}})
    )
    found = messages(mixed)
    assert "q_proj, k_proj, v_proj differ in format, and vLLM fuses them" in found
    assert f"group_size of {attention}.k_proj is None, NVFP4 has 16" in found


def test_a_name_in_quantized_layers_that_is_not_a_linear(mixed):
    entry = {"quant_algo": "FP8"}
    change_layers(mixed, lambda layers: layers.update({"language_model.lm_head": entry}))
    found = messages(mixed)
    assert "names language_model.lm_head, which is not a linear of this model" in found


def test_the_group_size_that_vllm_requires(nvfp4_weight_only, tmp_path):
    """Upstream trap: without it vLLM refuses NVFP4 checkpoints that come with this file alone."""
    copy = copy_without_digests(nvfp4_weight_only, tmp_path / "copy")
    edit_json(copy / "hf_quant_config.json", lambda c: c["quantization"].pop("group_size"))
    assert "group_size is None, W4A16_NVFP4 has 16" in messages(copy)


def test_a_weight_only_directory(nvfp4_weight_only, tiny, tmp_path):
    assert verify(nvfp4_weight_only, tiny) == []
    tensors = TensorFiles(nvfp4_weight_only)
    assert not [name for name in tensors if name.endswith("input_scale")]
    copy = copy_without_digests(nvfp4_weight_only, tmp_path / "copy")
    edit_tensors(copy, lambda t: t.update({f"{IN_PROJ}.input_scale": torch.ones(())}))
    # With an input scale, these are the tensors of another format.
    where = f"{copy / 'config.json'}: {IN_PROJ}"
    assert messages(copy) == str(
        Fault(where, "is NVFP4, config.json says W4A16_NVFP4", FIX_SECTION)
    )


def test_a_weight_only_directory_whose_q_k_v_scales_differ(nvfp4_weight_only, attention, tmp_path):
    copy = copy_without_digests(nvfp4_weight_only, tmp_path / "copy")
    edit_tensors(copy, lambda t: t[f"{attention}.k_proj.weight_scale_2"].mul_(2))
    assert f"{attention} weight_scale_2: differs" in messages(copy)


def test_a_flipped_weight_of_a_weight_only_directory(nvfp4_weight_only, tiny, tmp_path):
    copy = copy_without_digests(nvfp4_weight_only, tmp_path / "copy")

    def flip(tensors):
        codes = tensors[f"{IN_PROJ}.weight"].view(-1)
        codes[(codes & 0x77).argmax()] ^= 0x88  # the signs of the largest: a zero has none

    edit_tensors(copy, flip)
    assert f"{IN_PROJ}.weight" in messages(copy, tiny)
    assert "further from the source than nvfp4_weight_only rounding allows" in messages(copy, tiny)


def test_an_unquantized_tensor_that_differs_from_the_source(fp8_copy, tiny):
    edit_tensors(fp8_copy, lambda t: t["mlp1.1.weight"].view(torch.int16)[0, 0].add_(1))
    assert "mlp1.1.weight: differs from the source" in messages(fp8_copy, tiny)
    assert messages(fp8_copy) == ""


@pytest.mark.parametrize("factor", [0.5, 1.2, 2.0])
def test_a_weight_scale_that_belongs_to_other_weights(fp8_copy, tiny, factor):
    edit_tensors(fp8_copy, lambda t: t[f"{IN_PROJ}.weight_scale"].mul_(factor))
    assert f"{IN_PROJ}.weight" in messages(fp8_copy, tiny)
    assert "further from the source than fp8 rounding allows" in messages(fp8_copy, tiny)


def test_one_flipped_weight_is_found(fp8_copy, tiny):
    edit_tensors(
        fp8_copy, lambda t: t[f"{IN_PROJ}.weight"].view(torch.uint8)[3, 5].bitwise_xor_(0x20)
    )
    assert f"{IN_PROJ}.weight" in messages(fp8_copy, tiny)


def test_swapped_layers_are_found(fp8_copy, tiny, tiny_config):
    """Shapes, scales and names all fit; only the comparison with the source can tell."""
    first, second = [i for i, kind in enumerate(tiny_config.pattern) if kind == "-"][:2]

    def swap(tensors):
        for suffix in ("weight", "weight_scale", "input_scale"):
            a, b = (f"{LAYER.format(i, 'up_proj')}.{suffix}" for i in (first, second))
            tensors[a], tensors[b] = tensors[b], tensors[a]

    edit_tensors(fp8_copy, swap)
    assert messages(fp8_copy) == ""
    assert LAYER.format(first, "up_proj") in messages(fp8_copy, tiny)


def test_a_source_of_another_size_is_one_fault(fp8, tiny_copy):
    edit_json(tiny_copy / "config.json", lambda c: c.update(projector_hidden_size=64))
    (fault,) = verify(fp8, tiny_copy)
    assert fault.where == str(tiny_copy)
    assert fault.what.startswith("describes a model of other dimensions than ")
    assert "projector_hidden_size is 512" in fault.what


def test_truncated_weights(fp8_copy):
    shard = next(fp8_copy.glob("*.safetensors"))
    truncate(shard, 0.9)
    assert f"{shard}: is truncated: it has" in messages(fp8_copy)


def run_verify(*arguments):
    command = [sys.executable, "-m", "export.verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_table_shows_every_fault(tmp_path, capsys):
    show_faults(tmp_path, [Fault("here", "is wrong", "fix it"), Fault("there", "is [wrong] too")])
    table = " ".join(capsys.readouterr().err.split())
    assert "2 faults" in table
    assert all(word in table for word in ("here", "is wrong", "fix it", "there", "is [wrong] too"))


def test_the_command_line_gives_all_faults_and_exits_1(fp8_copy, tiny):
    edit_tensors(
        fp8_copy, lambda t: (t[f"{IN_PROJ}.input_scale"].fill_(0), t["mlp1.1.weight"].zero_())
    )
    edit_json(
        fp8_copy / "hf_quant_config.json", lambda c: c["quantization"].update(quant_algo="NVFP4")
    )
    result = run_verify(fp8_copy, "--source", tiny, "--json")
    found = json.loads(result.stdout)["faults"]
    assert result.returncode == 1
    assert {fault["where"].rpartition(": ")[2] for fault in found} >= {
        f"{IN_PROJ}.input_scale",
        "mlp1.1.weight",
    }
    assert "Traceback" not in result.stderr


def test_the_command_line_exits_2_for_no_checkpoint(tmp_path):
    result = run_forked("export.verify", tmp_path / "nowhere")
    assert result.returncode == 2
    assert "no such directory" in result.stderr
    assert "Traceback" not in result.stderr
