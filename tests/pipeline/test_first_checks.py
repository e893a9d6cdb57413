"""What can be told of a recipe without torch is told before torch is imported."""

import subprocess
import sys

import pytest

from checkpoint.lock import LOCK, locked_directory
from checkpoint.other_weights import SINGLE
from checkpoint.run_state import RunState
from export.verify import first_faults as first_faults_of_verify
from pipeline.first_checks import first_faults
from recipes.loading import SHIPPED, load_recipe
from tests.editing import edit_json

ROOT = SHIPPED.parent
FRONT_DOORS = {"fp8": "fp8", "nvfp4": "nvfp4", "qad": "nvfp4_qad"}


def told(recipe: str = "fp8", **overrides: object) -> list[str]:
    given = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return [str(f) for f in first_faults(load_recipe(SHIPPED / "tiny" / f"{recipe}.yaml", given))]


def run_without_torch(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that cannot import torch or what takes as long."""
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'modelopt', 'transformers', 'datasets'): sys.modules[name] = None\n"
        f"sys.argv = ['', *{arguments!r}]\n"
        f"runpy.run_module({module!r}, run_name='__main__')\n"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("door", FRONT_DOORS)
def test_every_front_door_checks_before_it_imports_torch(door, tmp_path):
    samples = f"[{{type: jsonl, path: {tmp_path / 'none.jsonl'}}}]"
    (tmp_path / "out").mkdir()
    arguments = [f"model={tmp_path / 'none'}", f"output={tmp_path / 'out'}"]
    arguments.append(f"calibrate.sources={samples}")
    done = run_without_torch(f"quantize.{door}", *arguments)
    assert done.stderr.splitlines() == [
        f"error: {tmp_path / 'none'}: no such directory (give the directory of a checkpoint)",
        f"error: {tmp_path / 'out'}: exists already (remove it, or give another output)",
        f"error: {tmp_path / 'none.jsonl'}: no such file (check the path)",
    ]
    assert done.returncode == 2


def test_a_sound_recipe_has_no_faults(tiny, tmp_path):
    assert told(model=tiny, output=tmp_path / "out") == []
    assert told(output=tmp_path / "out") == []
    assert told("nvfp4_qad", model=tiny, output=tmp_path / "deep" / "out") == []


# The model


def test_a_model_without_weights_is_told(tiny_copy, tmp_path):
    (tiny_copy / SINGLE).unlink()
    (fault,) = told(model=tiny_copy, output=tmp_path / "out")
    assert "contains neither model.safetensors.index.json nor model.safetensors" in fault


def test_a_truncated_weight_file_is_told(tiny_copy, tmp_path):
    with (tiny_copy / SINGLE).open("r+b") as file:
        file.truncate(1_000_000)
    (fault,) = told(model=tiny_copy, output=tmp_path / "out")
    assert "is truncated: it has 1000000 bytes" in fault


def test_a_quantized_model_is_told(tiny_copy, tmp_path):
    edit_json(tiny_copy / "config.json", lambda c: c.update(quantization_config={}))
    assert any(
        "is quantized already (give the BF16 checkpoint)" in fault
        for fault in told(model=tiny_copy, output=tmp_path / "out")
    )


def test_benchmarks_need_a_model_that_can_be_served(tiny_copy, tmp_path):
    edit_json(tiny_copy / "config.json", lambda c: c.update(torch_dtype="float32"))
    assert told(model=tiny_copy, output=tmp_path / "out") == []
    suites = {"accuracy__suites__names": "[chartqa]"}
    (fault,) = told(model=tiny_copy, output=tmp_path / "out", **suites)
    assert "torch_dtype is float32: vLLM would die at the first picture" in fault


NONE = "error: {}: no such directory (give the directory of a checkpoint)"


@pytest.mark.parametrize(
    ("module", "option"),
    [
        ("export.verify", "--source"),
        ("export.repair", "--source"),
        ("export.publish.report", "--source"),
        ("export.publish.card", "--source"),
        ("accuracy", "--reference"),
    ],
)
def test_commands_of_two_directories_tell_both_before_they_import_torch(module, option, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    done = run_without_torch(module, str(one), "-v", option, str(other))
    assert sorted(done.stderr.splitlines()) == [NONE.format(one), NONE.format(other)]
    assert done.returncode == 2


def test_a_source_that_is_quantized_is_told_by_verify(tiny_copy):
    edit_json(tiny_copy / "config.json", lambda c: c.update(quantization_config={}))
    (fault,) = first_faults_of_verify(tiny_copy, tiny_copy)
    assert str(fault) == f"{tiny_copy}: is quantized already (give the BF16 checkpoint)"


# The output


def test_an_output_inside_the_model_is_told(tiny_copy, tmp_path):
    (tmp_path / "link").symlink_to(tiny_copy)
    for output in (tiny_copy / "fp8", tiny_copy / "a" / "fp8", tmp_path / "link" / "fp8"):
        (fault,) = told(model=tiny_copy, output=output)
        assert fault.startswith(f"{output}: lies inside the source")
    assert not (tiny_copy / "a").exists()


def test_what_a_run_has_begun_or_written_is_no_fault(tmp_path):
    output = tmp_path / "out"
    state = RunState(output, {})
    with state.locked():
        state.begin()
        state.checkpoint.mkdir()
        state.record(layer=3)
    assert told(output=output) == []
    state.publish()
    assert output.is_dir()
    assert told(output=output) == []
    state.remove()
    assert told(output=output) == [f"{output}: exists already (remove it, or give another output)"]


def test_a_run_that_works_there_and_what_is_in_its_states_way_are_told(tmp_path):
    directory = tmp_path / ".out.run"
    directory.mkdir()
    with locked_directory(directory):
        (fault,) = told(output=tmp_path / "out")
        assert "another run is working here" in fault
    (directory / LOCK).unlink()
    (directory / "mine.txt").touch()
    (fault,) = told(output=tmp_path / "out")
    assert "no run has made it" in fault


def test_a_file_in_the_outputs_path_is_told(tmp_path):
    (tmp_path / "file").touch()
    (fault,) = told(output=tmp_path / "file" / "out")
    assert fault == f"{tmp_path / 'file'}: is a file, not a directory (give another output)"


# The samples


@pytest.mark.parametrize("section", ["calibrate", "accuracy", "distill"])
@pytest.mark.parametrize("kind", ["jsonl", "llava", "sharegpt", "parquet", "hub"])
def test_a_missing_file_of_any_source_is_told(kind, section, tmp_path):
    path = tmp_path / "none"
    named = f"[{{type: {kind}, {'name' if kind == 'hub' else 'path'}: {path}}}]"
    found = told("nvfp4_qad", output=tmp_path / "out", **{f"{section}__sources": named})
    assert found == [f"{path}: no such file (check the path)"]


def test_a_name_on_the_hub_and_a_folder_are_not_looked_into(tmp_path):
    for source in ("{type: hub, name: org/data}", f"{{type: parquet, path: {tmp_path}}}"):
        assert told(output=tmp_path / "out", calibrate__sources=f"[{source}]") == []


def test_a_folder_in_place_of_a_file_is_told(tmp_path):
    (fault,) = told(
        output=tmp_path / "out", calibrate__sources=f"[{{type: jsonl, path: {tmp_path}}}]"
    )
    assert fault == f"{tmp_path}: is a directory, not a file (give a file)"
