"""The manifest of a finished export: what made it, from what; the same for the same inputs."""

import json

from checkpoint.run_state import file_digest
from export.manifest import MANIFEST, read_manifest


def content(directory):
    return json.loads((directory / MANIFEST).read_text())


def test_it_names_every_file_by_its_sha256(fp8):
    found = content(fp8)["files"]
    names = {str(path.relative_to(fp8)) for path in fp8.rglob("*") if path.is_file()}
    assert set(found) == names - {MANIFEST}
    for name, digest in found.items():
        assert digest == file_digest(fp8 / name)


def test_it_says_what_the_export_was_made_from(fp8, tiny):
    manifest = read_manifest(fp8)
    assert manifest.source["revision"] is None
    assert manifest.source["files"]["model.safetensors"] == file_digest(tiny / "model.safetensors")
    assert manifest.source["files"]["config.json"] == file_digest(tiny / "config.json")
    assert manifest.calibration["algorithm"] == "max"
    assert len(set(manifest.calibration["digests"])) == manifest.calibration["samples"] == 7
    assert manifest.gate["passed"] is not None
    (*_, mean) = manifest.gate["tasks"]
    assert mean["low"] <= mean["variant"] - mean["reference"] <= mean["high"]
    assert set(manifest.times["seconds"]) == {"calibrate, quantize and write", "verify", "measure"}
    assert manifest.video.pruning_rate == 0.75
    assert manifest.versions["torch"]


def test_the_same_inputs_give_the_same_bytes(nvfp4, nvfp4_export):
    again = nvfp4_export()
    assert {path.name for path in again.iterdir()} == {path.name for path in nvfp4.iterdir()}
    for path in again.iterdir():
        if path.name != MANIFEST:
            assert path.read_bytes() == (nvfp4 / path.name).read_bytes(), path.name
    first = content(nvfp4)
    second = content(again)
    for manifest in (first, second):
        del manifest["times"]
        del manifest["recipe"]["output"]  # the second was written beside the first
    assert second == first
