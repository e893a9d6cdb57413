"""Every damage of tests/export/damages.py is found, by a fault that names file and key; sound
exports, and what their users may change, have no fault.
"""

import shutil
import time
from pathlib import Path

import pytest
from damages import FP8, MIXED, TRAINED, UNQUANTIZED, Damage

from export.beside import pickle_faults
from export.input_ranges import observed_ranges
from export.manifest import MANIFEST
from export.verify import verification, verify
from tests.editing import edit_json

RULES = "[{format: nvfp4}, {format: fp8, kind: attention}, {format: bf16, kind: mlp}]"
CASES = [("fp8", damage) for damage in FP8]
CASES += [("mixed", damage) for damage in MIXED]
CASES += [("trained", damage) for damage in TRAINED]


@pytest.fixture(scope="module")
def exports(fp8, nvfp4, nvfp4_export, tmp_path_factory) -> dict[str, Path]:
    """The exports that are damaged; they must not be changed."""
    mixed = nvfp4_export(f"quantize.layers={RULES}", "quantize.kv_cache=fp8")
    # What a distillation leaves is an export that names its tensors; these were trained in no step.
    trained = Path(shutil.copytree(nvfp4, tmp_path_factory.mktemp("x") / "trained"))
    tensors = [f"language_model.backbone.layers.{layer}.mixer.in_proj" for layer in (0, 2, 5, 7)]
    names = [*UNQUANTIZED, *(f"{name}.weight" for name in tensors)]
    edit_json(trained / MANIFEST, lambda m: m["distillation"].update(trained=names))
    return {"fp8": fp8, "mixed": mixed, "trained": trained}


@pytest.fixture(scope="module", autouse=True)
def inputs_of_the_source_once():
    """Let the source's inputs be observed once: it is the same for all damages."""
    observed = {}

    def observed_once(source):
        if source.directory not in observed:
            observed[source.directory] = observed_ranges(source)
        return observed[source.directory]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.input_ranges.observed_ranges", observed_once)
        yield


def faults_by(seer: str, directory: Path, tiny: Path) -> str:
    if seer != "manifest" and MANIFEST in {path.name for path in directory.iterdir()}:
        forget_digests(directory)
    source = tiny if seer == "source" else None
    found = verification(directory, source).faults
    return "\n".join(str(fault) for fault in found)


def forget_digests(directory: Path) -> None:
    path = directory / MANIFEST
    if path.read_text().startswith("{\n"):
        edit_json(path, lambda manifest: manifest.pop("files"))


@pytest.mark.parametrize(("kind", "damage"), CASES, ids=[f"{k} {d.name}" for k, d in CASES])
def test_it_is_found_and_named(exports, tiny, tmp_path, kind: str, damage: Damage):
    directory = tmp_path / kind
    shutil.copytree(exports[kind], directory)
    damage.do(directory)
    for seer in sorted(damage.seen, key=["manifest", "source", "alone"].index):
        found = faults_by(seer, directory, tiny)
        named = [line for line in found.splitlines() if damage.file in line]
        if seer != "manifest":  # the manifest knows files
            named = [line for line in named if damage.key in line]
        assert named, f"{seer}: {found}"


def test_there_are_enough_kinds():
    assert len({f"{kind} {damage.name}" for kind, damage in CASES}) == len(CASES) >= 100


@pytest.mark.parametrize("kind", ["fp8", "mixed", "trained"])
@pytest.mark.parametrize("seer", ["manifest", "source", "alone"])
def test_a_sound_export_has_no_faults(exports, tiny, tmp_path, kind, seer):
    directory = Path(shutil.copytree(exports[kind], tmp_path / kind))
    assert faults_by(seer, directory, tiny) == ""


def test_documents_and_pictures_may_be_changed_and_added(fp8, tiny, tmp_path):
    directory = Path(shutil.copytree(fp8, tmp_path / "fp8"))
    (directory / "README.md").write_text("---\nlicense: other\n---\n# Mine\n")
    (directory / "LICENSE").write_text("terms")
    (directory / "images").mkdir()
    (directory / "images" / "stack.png").write_bytes(b"\x89PNG")
    (directory / "report.html").write_text("<html></html>")
    (directory / ".gitattributes").write_text("*.safetensors filter=lfs")
    (directory / ".eval_results").mkdir()
    (directory / ".eval_results" / "a.yaml").write_text("a: 1")
    assert verify(directory) == []
    assert verify(directory, tiny) == []


def test_what_was_not_checked_is_said(fp8, tiny, tmp_path):
    assert verification(fp8, tiny).unchecked == []
    assert "give --source" in str(verification(fp8).unchecked)
    directory = Path(shutil.copytree(fp8, tmp_path / "fp8"))
    (directory / MANIFEST).unlink()
    assert "records no SHA-256" in str(verification(directory, tiny).unchecked)


def test_hostile_files_are_refused_in_a_moment(fp8, tmp_path):
    directory = Path(shutil.copytree(fp8, tmp_path / "fp8"))
    with (directory / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)  # sparse: it would take for ever to read
    with (directory / "hf_quant_config.json").open("wb") as file:
        file.truncate(2**40)
    forget_digests(directory)
    before = time.process_time()
    found = {Path(fault.where).name for fault in verify(directory)}
    assert {"tokenizer.json", "hf_quant_config.json"} <= found
    assert time.process_time() - before < 5


def test_a_header_of_any_length_is_no_pickle(tmp_path):
    """A length such as 0x0280 gives the file the first bytes of a pickle of protocol 2."""
    header = b'{"__metadata__":{"x":"' + b"a" * (0x0280 - 25) + b'"}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert list(pickle_faults(path, tmp_path)) == []
