"""A repair corrects what needs no calibration, says what it changed, and changes nothing else."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file

from checkpoint.faults import main
from checkpoint.files import TensorFiles
from checkpoint.native import load_model
from checkpoint.opened import open_bf16
from checkpoint.other_weights import SINGLE
from export.repair.__main__ import _run
from export.repair.directory import CannotRepair, repair
from export.repair.staging import restore_interrupted
from export.verify import verify
from quantize.policy import Rule
from tests.editing import cast_weights, edit_json, edit_tensors, truncate
from tests.export.test_write import quantized, write

CONFIG = "config.json"
LEGACY = "hf_quant_config.json"
MANIFEST = "hybridquant.json"
IN_PROJ = "language_model.backbone.layers.0.mixer.in_proj"


@pytest.fixture(scope="module")
def mixed_for_repair(tiny_checkpoint, tmp_path_factory) -> Path:
    """NVFP4, attention in FP8 and MLPs in BF16; do not change it, take `mixed`."""
    rules = [Rule(format="nvfp4"), Rule(format="fp8", kind="attention")]
    rules.append(Rule(format="bf16", kind="mlp"))
    model = load_model(tiny_checkpoint)
    output = tmp_path_factory.mktemp("mixed") / "mixed"
    write(model, tiny_checkpoint, quantized(model, tiny_checkpoint, rules), output)
    return output


@pytest.fixture
def mixed(mixed_for_repair, tmp_path) -> Path:
    return Path(shutil.copytree(mixed_for_repair, tmp_path / "mixed"))


def contents(directory: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            found[path.relative_to(directory).as_posix()] = path.read_bytes()
    return found


def identities(directory: Path) -> dict[Path, tuple[int, int]]:
    """What tells that a file has not even been written again."""
    found = {}
    for path in directory.iterdir():
        found[path] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def changed_files(before: dict[str, bytes], directory: Path) -> set[str]:
    after = contents(directory)
    names = set(before) | set(after)
    return {name for name in names if before.get(name) != after.get(name)}


def edit_section(directory: Path, change) -> None:
    edit_json(directory / CONFIG, lambda raw: change(raw["quantization_config"]))


def corrupt_lists(directory: Path) -> None:
    """Upstream trap: ModelOpt 0.47's entries for this model end in a NUL and a sentinel."""

    def corrupted(entries):
        return [f"{entry}.\0backbone.pt_name_sentinel" for entry in entries]

    edit_section(directory, lambda section: section.update(ignore=corrupted(section["ignore"])))
    edit_json(
        directory / LEGACY,
        lambda raw: raw["quantization"].update(
            exclude_modules=corrupted(raw["quantization"]["exclude_modules"])
        ),
    )


def widen_list(directory: Path) -> None:
    """A glob that makes vLLM take the whole language model for BF16."""
    edit_section(directory, lambda section: section["ignore"].append("language_model*"))


def forget_lm_head(directory: Path) -> None:
    edit_section(directory, lambda section: section.update(ignore=["*.mixer.conv1d"]))


SECTIONS = [
    (corrupt_lists, {CONFIG, LEGACY}),
    (widen_list, {CONFIG}),
    (forget_lm_head, {CONFIG, LEGACY}),
    (
        lambda folder: edit_section(folder, lambda section: section.update(ignore="lm_head")),
        {CONFIG, LEGACY},
    ),
    (lambda folder: edit_section(folder, lambda section: section.pop("ignore")), {CONFIG, LEGACY}),
    (
        lambda folder: edit_section(folder, lambda section: section.update(quant_algo="NVFP4")),
        {CONFIG, LEGACY},
    ),
    (
        lambda folder: edit_section(folder, lambda section: section.update(quant_method="x")),
        {CONFIG, LEGACY},
    ),
    (
        lambda folder: edit_json(folder / CONFIG, lambda raw: raw.pop("quantization_config")),
        {CONFIG, LEGACY},
    ),
    (lambda folder: (folder / LEGACY).unlink(), {LEGACY}),
    (lambda folder: (folder / LEGACY).write_text("{"), {LEGACY}),
    (
        lambda folder: edit_json(
            folder / LEGACY, lambda raw: raw["quantization"].update(quant_algo="NVFP4")
        ),
        {LEGACY},
    ),
]


@pytest.mark.parametrize(("damage", "written"), SECTIONS)
def test_a_damaged_section_gets_its_bytes_back_and_nothing_else_is_touched(
    fp8_copy, fp8, damage, written
):
    damage(fp8_copy)
    assert verify(fp8_copy) != []
    before = contents(fp8_copy)
    changes = repair(fp8_copy, None)
    assert changes
    assert {change.partition(":")[0] for change in changes} <= {CONFIG, LEGACY}
    assert changed_files(before, fp8_copy) <= written
    assert verify(fp8_copy) == []
    assert contents(fp8_copy) == contents(fp8)


def test_a_sound_directory_is_left_as_it_is(fp8_copy, tiny, capsys):
    before = identities(fp8_copy)
    assert _run([str(fp8_copy), "--source", str(tiny)]) == 0
    assert identities(fp8_copy) == before
    assert capsys.readouterr().out == f"{fp8_copy}: there is nothing to repair\n"
    assert [path.name for path in fp8_copy.parent.iterdir()] == ["fp8"]


def test_an_exclude_list_of_the_users_own_stays_where_vllm_reads_it_alike(fp8_copy, tiny):
    mine = ["*lm_head*", "*conv1d*", "*mine*"]
    edit_section(fp8_copy, lambda section: section.update(ignore=mine))
    repair(fp8_copy, tiny)
    legacy = json.loads((fp8_copy / LEGACY).read_text())
    assert legacy["quantization"]["exclude_modules"] == mine
    assert verify(fp8_copy, tiny) == []


def test_a_mixed_directory(mixed):
    def damage(section):
        section["quantized_layers"][IN_PROJ]["quant_algo"] = "FP8"
        section["ignore"].append("language_model*")

    edit_section(mixed, damage)
    before = contents(mixed)
    assert repair(mixed, None) == [
        "config.json: quantized_layers gives each linear the format of its tensors",
        "config.json: ignore leaves out what has no scales, and nothing else",
    ]
    assert changed_files(before, mixed) == {CONFIG}
    assert verify(mixed) == []


def test_files_beside_the_weights_come_from_the_source(fp8_copy, tiny, fp8):
    for name in ("tokenizer.json", "configuration.py"):
        (fp8_copy / name).unlink()
    (fp8_copy / "chat_template.jinja").write_text("{{ messages }}")
    (fp8_copy / "README.md").write_text("my card")
    edit_json(fp8_copy / CONFIG, lambda raw: raw.update(norm_mean=[0.0, 0.0, 0.0], mine=1))
    changes = repair(fp8_copy, tiny)
    assert sorted(changes) == [
        "chat_template.jinja: taken from the source (it differed)",
        "config.json: mine removed, which the source does not have",
        "config.json: norm_mean is the source's again",
        "configuration.py: taken from the source (it was missing)",
        "tokenizer.json: taken from the source (it was missing)",
    ]
    repaired, original = contents(fp8_copy), contents(fp8)
    assert repaired.pop("README.md") == b"my card"
    assert json.loads(repaired.pop(CONFIG)) == json.loads(original.pop(CONFIG))
    assert repaired == original


def test_a_missing_tensor_comes_from_the_source(fp8_copy, tiny):
    edit_tensors(fp8_copy, lambda tensors: tensors.pop("mlp1.1.weight"))
    changes = repair(fp8_copy, tiny)
    assert "weights: 1 tensors taken from the source, such as mlp1.1.weight" in changes
    assert verify(fp8_copy, tiny) == []


def test_a_missing_tensor_comes_from_a_source_in_float32_as_bf16(fp8_copy, tiny_copy):
    cast_weights(tiny_copy, "float32", "mlp1.")
    norm = "language_model.backbone.norm_f.weight"
    widen = {norm: load_file(tiny_copy / SINGLE)[norm].float()}
    edit_tensors(tiny_copy, lambda tensors: tensors.update(widen))
    edit_tensors(fp8_copy, lambda tensors: tensors.pop(norm))
    rounded = open_bf16(tiny_copy).tensors
    lost = [name for name in rounded if name.startswith("mlp1.")]
    edit_tensors(fp8_copy, lambda tensors: [tensors.pop(name) for name in lost])
    changes = repair(fp8_copy, tiny_copy)
    assert any(f"weights: {len(lost) + 1} tensors taken from the source" in c for c in changes)
    assert verify(fp8_copy, tiny_copy) == []
    repaired = TensorFiles(fp8_copy)
    for name in (norm, *lost):
        assert repaired.specs[name].dtype == "BF16"
        assert torch.equal(repaired.read(name), rounded.read(name)), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_not_quantized_is_said_once(tiny_copy, dtype):
    cast_weights(tiny_copy, dtype)
    with pytest.raises(CannotRepair) as caught:
        repair(tiny_copy, None)
    (fault,) = caught.value.faults
    assert str(fault) == (
        f"{tiny_copy}: no linear has the tensors of a known format (quantize again)"
    )


def test_a_manifest_of_version_0_1(fp8_copy):
    def age(manifest):
        manifest["serve"]["video_pruning_rate"] = manifest.pop("video")["pruning_rate"]

    edit_json(fp8_copy / MANIFEST, age)
    assert repair(fp8_copy, None) == [
        "hybridquant.json: serve.video_pruning_rate is now video.pruning_rate, 0.75"
    ]
    manifest = json.loads((fp8_copy / MANIFEST).read_text())
    assert manifest["video"] == {"pruning_rate": 0.75}
    assert "video_pruning_rate" not in manifest["serve"]


def record_hashes(directory: Path) -> dict[str, str]:
    """Let the manifest record every file, as it does once an export is verified."""
    recorded = {}
    for name, data in contents(directory).items():
        if name != MANIFEST:
            recorded[name] = hashlib.sha256(data).hexdigest()
    edit_json(directory / MANIFEST, lambda raw: raw.update(files=recorded))
    return recorded


def test_recorded_hashes_follow_what_the_source_proves(fp8_copy, tiny):
    recorded = record_hashes(fp8_copy)
    mine = ["*lm_head*", "*conv1d*", "*mine*"]
    edit_section(fp8_copy, lambda section: section.update(ignore=mine))
    assert "hybridquant.json: 2 new hashes, 0 removed" in repair(fp8_copy, tiny)
    files = json.loads((fp8_copy / MANIFEST).read_text())["files"]
    assert {name for name in files if files[name] != recorded[name]} == {CONFIG, LEGACY}


def test_no_hash_vouches_for_what_the_repair_cannot_judge(fp8_copy, tiny):
    """A changed key of config.json is served, and answers wrongly; only the source tells."""
    recorded = record_hashes(fp8_copy)
    widen_list(fp8_copy)
    edit_json(fp8_copy / CONFIG, lambda raw: raw.update(norm_mean=[0.0, 0.0, 0.0]))
    before = contents(fp8_copy)
    with pytest.raises(
        CannotRepair, match=r"its SHA-256 is still not the one in hybridquant\.json"
    ):
        repair(fp8_copy, None)
    assert contents(fp8_copy) == before
    repair(fp8_copy, tiny)
    assert json.loads((fp8_copy / MANIFEST).read_text())["files"] == recorded


def break_weights(directory: Path) -> None:
    truncate(next(directory.glob("*.safetensors")), 0.9)


def lose_a_scale(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop(f"{IN_PROJ}.weight_scale"))


def flip_a_weight(directory: Path) -> None:
    def flip(tensors):
        tensors[f"{IN_PROJ}.weight"].view(torch.uint8)[3, 5].bitwise_xor_(0x20)

    edit_tensors(directory, flip)


@pytest.mark.parametrize("damage", [break_weights, flip_a_weight])
def test_what_cannot_be_repaired_is_said_and_nothing_is_changed(fp8_copy, tiny, damage, capsys):
    damage(fp8_copy)
    corrupt_lists(fp8_copy)
    before = contents(fp8_copy)
    assert _run([str(fp8_copy), "--source", str(tiny)]) == 1
    assert contents(fp8_copy) == before
    assert "cannot be repaired, nothing was changed" in capsys.readouterr().out
    assert [path.name for path in fp8_copy.parent.iterdir()] == ["fp8"]


def test_a_lost_scale_names_the_tensor_and_the_directory(fp8_copy):
    lose_a_scale(fp8_copy)
    with pytest.raises(CannotRepair) as caught:
        repair(fp8_copy, None)
    (fault,) = caught.value.faults
    assert fault.where == str(fp8_copy)
    assert f"tensor {IN_PROJ}.weight is F8_E4M3" in fault.what
    assert fault.remedy == "give --source BF16_DIR"


def test_a_killed_exchange_is_undone(fp8_copy):
    before = contents(fp8_copy)
    os.rename(fp8_copy, fp8_copy.with_name(".fp8.before-repair"))
    restore_interrupted(fp8_copy)
    assert contents(fp8_copy) == before
    assert [path.name for path in fp8_copy.parent.iterdir()] == ["fp8"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "nowhere: no such directory (give the directory of a checkpoint)"),
        ("", "config.json: no such file (is this a checkpoint directory?)"),
    ],
)
def test_what_is_no_checkpoint_exits_with_2(tmp_path, capsys, name, said):
    with pytest.raises(SystemExit) as ended:
        main(lambda: _run([str(tmp_path / name)]))
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def modelopt_exports(tiny_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """What ModelOpt's own exporter writes of transformers' class: of the language model alone, and
    of the whole model.
    """
    folder = tmp_path_factory.mktemp("modelopt")
    whole, part = load_model(tiny_checkpoint), load_model(tiny_checkpoint)
    for model in (whole, part):
        quantized(model, tiny_checkpoint, [Rule(format="fp8")])
    whole.config.architectures = ["NemotronH_Omni_Reasoning_V3"]  # from_pretrained would set it
    export_hf_checkpoint(whole, dtype=torch.bfloat16, export_dir=folder / "whole")
    target = folder / "language_model"
    export_hf_checkpoint(part.language_model, dtype=torch.bfloat16, export_dir=target)
    return {"whole": folder / "whole", "language_model": folder / "language_model"}


@pytest.mark.parametrize("part", ["language_model", "whole"])
def test_a_directory_of_modelopts_exporter(modelopt_exports, part, tiny, tmp_path):
    copy = Path(shutil.copytree(modelopt_exports[part], tmp_path / "copy"))
    before = contents(copy)
    with pytest.raises(CannotRepair, match="give --source BF16_DIR"):
        repair(copy, None)
    assert contents(copy) == before
    changes = repair(copy, tiny)
    assert any("tensors renamed, such as" in change for change in changes)
    assert any("tensors taken from the source" in change for change in changes)
    assert verify(copy, tiny) == []


def test_a_directory_of_the_released_class(fp8_copy, tiny):
    """ModelOpt's exporter with the checkpoint's own Python class and transformers 5.14: corrupted
    entries, and `embedding` for `embeddings`.
    """
    corrupt_lists(fp8_copy)
    (fp8_copy / MANIFEST).unlink()
    name = "language_model.backbone.{}.weight"

    def rename(tensors):
        tensors[name.format("embedding")] = tensors.pop(name.format("embeddings"))

    edit_tensors(fp8_copy, rename)
    changes = repair(fp8_copy, None)
    old, new = name.format("embedding"), name.format("embeddings")
    assert f"weights: 1 tensors renamed, such as {old} to {new}" in changes
    assert verify(fp8_copy, tiny) == []
